"""Samples on their way from conversations to the target: kept on disk, so that a data set need not fit the
memory."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from draftkit.data.samples import Sample
from draftkit.output import naming


class SampleSpool:
    """Token ids and masks of samples end to end in an unnamed file under `folder`; ids, domains and lengths
    in memory.

    `too_long` counts those of more than `max_length` tokens, which are not kept.
    """

    def __init__(self, samples: Iterable[Sample], folder: Path, max_length: int) -> None:
        self._ids: list[str] = []
        self._conversations: list[str] = []
        self._domains: list[str] = []
        self._names: dict[str, str] = {}  # one string for each domain
        self._ends = array("q", [0])
        self.too_long = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by __exit__
        for sample in samples:
            if len(sample.tokens) > max_length:
                self.too_long += 1
                continue
            packed = (np.asarray(sample.tokens, np.uint32) << 1) | np.asarray(sample.loss_mask, np.uint32)
            with naming(folder):
                self._file.write(packed.tobytes())
            self._ids.append(sample.id)
            self._conversations.append(sample.conversation)
            self._domains.append(self._names.setdefault(sample.domain, sample.domain))
            self._ends.append(self._ends[-1] + len(packed))
        with naming(folder):
            self._file.flush()
        ends = np.frombuffer(self._ends, np.int64)
        lengths = np.diff(ends)
        # By length, so that batches waste little on padding; of equals by id: the order of the files does not
        # count.
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], self._ids[i]))
        self._order = np.asarray(order, np.int64)
        self.lengths = lengths[self._order]
        self._packed = np.memmap(self._file, np.uint32, "r") if len(self._ids) else np.empty(0, np.uint32)

    def __enter__(self) -> SampleSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._packed
        self._file.close()

    def __len__(self) -> int:
        return len(self._ids)

    def digest(self) -> str:
        """sha256 of all samples, whatever the order in which they came."""
        digest = hashlib.sha256()
        for index in self._order:
            packed = self._packed[self._ends[index] : self._ends[index + 1]]
            digest.update(
                f"{self._ids[index]}\0{self._domains[index]}\0{len(packed)}\0".encode() + packed.tobytes()
            )
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self._ends[-1]

    def part(self, start: int, end: int) -> Sequence[Sample]:
        """Samples by their place in the order of lengths."""
        return [self._sample(int(i)) for i in self._order[start:end]]

    def _sample(self, index: int) -> Sample:
        packed = self._packed[self._ends[index] : self._ends[index + 1]]
        tokens, mask = (packed >> 1).tolist(), (packed & 1).astype(bool).tolist()
        return Sample(
            self._ids[index], self._conversations[index], self._domains[index], tuple(tokens), tuple(mask)
        )

"""The feature store: what the target thought while it read conversations, on disk.

A store is a folder:

    manifest.json              what it was made from; written once (`manifest.py`)
    index-WWW.jsonl            what was written where; appended to, never changed (`index.py`)
    shard-WWW-NNNNN.bin        records end to end, at most 1 GiB (`record.py`)

WWW is the process that wrote them. A record is read by itself, and checked when it is first read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from draftkit.errors import FeatureStoreError
from draftkit.features.index import HOW_TO_REPAIR, Index, Record, shard_name
from draftkit.features.manifest import read_manifest
from draftkit.features.record import Text
from draftkit.features.shards import Shards
from draftkit.features.source import FeatureSample, empty_sample

Columns = dict[str, NDArray[np.int64]]


class FeatureStore:
    """Reader: `len(store)` samples, shortest first, `store[i]` one of them. Threads may share a store.

    Raises FeatureStoreError when a shard is missing or short, the index is damaged, or capture was not
    finished; reading a record that is damaged raises one that names it.
    """

    ahead = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)
        self.manifest = read_manifest(folder)
        index = Index(folder)
        columns = whole_records(index, folder)
        _check_shards(folder, columns)
        self.parts, self.inputs = index.parts, index.inputs
        self._lines = index.lines
        self._domain_names = list(index.domain_names)
        self._place = np.stack([columns["file"], columns["line_at"]], 1)
        self._key = np.stack([columns[name] for name in ("conversation", "sample", "window")], 1)
        self._lengths = columns["tokens"] - columns["start"]
        self._domain = columns["domain"]
        self._checked = np.zeros(len(self._lengths), bool)
        self._shards = Shards(folder, self.manifest.form)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> FeatureSample:
        sample = self._shards.sample(self.record(index), not self._checked[index])
        self._checked[index] = True
        return sample

    def record(self, index: int) -> Record:
        """Where a sample lies."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends an iteration over the store
        file, at = self._place[index].tolist()
        return self._lines.record(file, at)

    def read(self, indices: Sequence[int], last_hidden: bool = True) -> list[FeatureSample]:
        """See `FeatureSource`; records are whole, as their checksums are."""
        return [self[i] for i in indices]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, without reading a shard."""
        return self._lengths

    def domains(self) -> Sequence[str]:
        """The domain of each sample."""
        return [self._domain_names[number] for number in self._domain]

    def conversations(self) -> NDArray[np.int64]:
        """The number of the conversation that each sample is part of."""
        return self._key[:, 0]

    def weights(self) -> NDArray[np.float64]:
        """See `FeatureSource`."""
        return np.ones(len(self))

    def keys(self) -> NDArray[np.int64]:
        """Conversation, sample and window of each sample, int64 [len, 3]."""
        return self._key

    def made_from(self) -> dict[str, Any]:
        """The manifest and the digests of the conversations."""
        said = sorted(note["digest"] for note in self.inputs.values())
        return self.manifest.made_from() | {"conversations": said}

    def digest(self) -> str:
        """sha256 over the keys and checksums of all records, whichever process wrote them and where."""
        digest = hashlib.sha256()
        for index in np.lexsort(self._key.T[::-1]).tolist():
            record = self.record(index)
            digest.update(f"{record.key} {record.sha256}\n".encode())
        return digest.hexdigest()

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource`; reads no features."""
        text = self.whole_text(index)
        return text.tokens_E[text.start :], text.mask

    def whole_text(self, index: int) -> Text:
        """All tokens that the target has read for a sample."""
        return self._shards.text(self.record(index))

    def empty(self) -> FeatureSample:
        """See `FeatureSource`."""
        form = self.manifest.form
        return empty_sample(form.layers * form.hidden_size, form.hidden_size, form.read_dtype)

    def check_matches(self, *asked: Any) -> None:
        """See `StoreManifest.check_matches`."""
        self.manifest.check_matches(self.name, *asked)


def whole_records(index: Index, folder: Path) -> Columns:
    """The records that count, by column, in the order of a store: shortest first, of equals by key.

    Raises FeatureStoreError when parts are missing or the store was not finished.
    """
    covered = {
        p for note in index.inputs.values() for p in range(note["first"], note["first"] + note["parts"])
    }
    holds = sum(index.written.values())
    if not covered or (set(index.parts) | set(index.written)) - covered:
        raise FeatureStoreError(
            f"{folder}: holds {holds} samples of a capture that was not finished; run the same "
            f"`draftkit capture` again to finish it"
        )
    if missing := [p for p in covered if not index.is_done(p)]:
        lacks = sum(index.parts[p]["records"] - index.written.get(p, 0) for p in missing if p in index.parts)
        raise FeatureStoreError(
            f"{folder}: lacks {lacks} of {holds + lacks} samples; run the same `draftkit capture` again"
        )
    columns = index.columns()
    rows = np.flatnonzero(index.alive())
    order = [columns[name][rows] for name in ("offset", "window", "sample", "conversation")]
    rows = rows[np.lexsort([*order, (columns["tokens"] - columns["start"])[rows]])]
    columns = {name: column[rows] for name, column in columns.items()}
    again = np.ones(len(rows), bool)  # a record that two processes wrote counts once
    for name in ("conversation", "sample", "window"):
        again[1:] &= columns[name][1:] == columns[name][:-1]
    again[:1] = False
    return {name: column[~again] for name, column in columns.items()}


def _check_shards(folder: Path, columns: Columns) -> None:
    shards = columns["writer"] * 2**32 + columns["shard"]
    names, where = np.unique(shards, return_inverse=True)
    ends = np.zeros(len(names), np.int64)
    np.maximum.at(ends, where, columns["offset"] + columns["size"])
    for name, end in zip(names.tolist(), ends.tolist(), strict=True):
        path = folder / shard_name(*divmod(name, 2**32))
        size = path.stat().st_size if path.is_file() else 0
        if size < end:
            raise FeatureStoreError(f"{path}: has {size} of {end} bytes; {HOW_TO_REPAIR}")

"""Features computed while training: no store, or one that fills in the first epoch.

The texts come from a store without features, which capture makes of conversations first; the target, or a
server, reads those that a micro-batch needs. What is read is rounded as a store would round it, so that a run
has the same losses from either, and texts that are needed together are read together, so that a run that was
interrupted gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from draftkit.features.compute import Reader
from draftkit.features.manifest import begin_store
from draftkit.features.record import RecordForm
from draftkit.features.shards import Shards
from draftkit.features.source import FeatureSample, empty_sample
from draftkit.features.store import FeatureStore
from draftkit.features.writer import StoreWriter, check_room


class LiveFeatures:
    """Samples whose texts lie in `texts`, read by `reader` when they are asked for; `dtype` is what a store
    of them would have. `ahead`: whether the reader may work while the device trains."""

    def __init__(self, texts: FeatureStore, reader: Reader, dtype: str, ahead: bool) -> None:
        self.texts, self.ahead, self.name = texts, ahead, f"{texts.name} (live)"
        self._reader = reader
        manifest = texts.manifest
        self.form = RecordForm(dtype, len(manifest.feature_layers), manifest.hidden_size)

    def __len__(self) -> int:
        return len(self.texts)

    def lengths(self) -> NDArray[np.int64]:
        """See `FeatureSource`."""
        return self.texts.lengths()

    def domains(self) -> Sequence[str]:
        """See `FeatureSource`."""
        return self.texts.domains()

    def conversations(self) -> NDArray[np.int64]:
        """See `FeatureSource`."""
        return self.texts.conversations()

    def weights(self) -> NDArray[np.float64]:
        """See `FeatureSource`."""
        return self.texts.weights()

    def made_from(self) -> dict[str, Any]:
        """What a store of these features says of itself."""
        return self.texts.made_from() | {"dtype": self.form.dtype}

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource`."""
        return self.texts.text(index)

    def read(self, indices: Sequence[int], last_hidden: bool = True) -> list[FeatureSample]:
        """See `FeatureSource`; features are where the reader has them."""
        texts = [self.texts.whole_text(i) for i in indices]
        return [
            FeatureSample(t.id, t.domain, t.tokens_E[t.start :], t.mask, *map(self.form.rounded, pair))
            for t, pair in zip(texts, self._reader.read(texts, last_hidden), strict=True)
        ]

    def empty(self) -> FeatureSample:
        """See `FeatureSource`."""
        width = self.form.layers * self.form.hidden_size
        return empty_sample(width, self.form.hidden_size, self.form.read_dtype)


class FillingFeatures(LiveFeatures):
    """Live features that are kept: each sample is computed once, and comes from the store in `folder` from
    then on. When the store has all of them it is finished. Several processes may fill one.

    Raises FeatureStoreError when the folder holds another store, or the disk cannot take this one.
    """

    def __init__(self, texts: FeatureStore, reader: Reader, dtype: str, folder: Path) -> None:
        super().__init__(texts, reader, dtype, False)
        self.name = str(folder)
        self.manifest = begin_store(folder, replace(texts.manifest, dtype=dtype))
        self._writer = StoreWriter(folder)
        self._shards = Shards(folder, self.form)
        numbers = _numbers(texts.keys())
        self._order = np.argsort(numbers)
        self._sorted = numbers[self._order]
        self._row = np.full(len(texts), -1, np.int64)  # of each sample in the index
        self._checked = np.zeros(len(texts), bool)
        self._seen = 0  # rows of the index
        self._look()
        left = np.flatnonzero(self._row < 0)
        some = left[:: max(1, len(left) // 100)].tolist()
        size = sum(self.form.record_bytes(texts.whole_text(i)) for i in some)
        check_room(folder, size * len(left) // max(1, len(some)))

    def read(self, indices: Sequence[int], last_hidden: bool = True) -> list[FeatureSample]:
        """See `FeatureSource`. Where one is missing all are computed, whole, so that which ones were there
        changes no bit."""
        if (self._row[indices] < 0).any():
            self._look()
        missing = [place for place, i in enumerate(indices) if self._row[i] < 0]
        if missing:
            texts = [self.texts.whole_text(i) for i in indices]
            read = self._reader.read(texts)
            part = {p: self.texts.record(indices[p]).part for p in missing}
            records = [(texts[p], part[p], self.form.encode(texts[p], *read[p])) for p in missing]
            self._writer.add(records)
            self._look()
        return [self._sample(i) for i in indices]

    def _sample(self, index: int) -> FeatureSample:
        record = self._writer.index.record(int(self._row[index]))
        sample = self._shards.sample(record, not self._checked[index])
        self._checked[index] = True
        return sample

    def _look(self) -> None:
        """Take up what this and other processes have added; finish the store with its last record."""
        index = self._writer.index
        index.refresh()
        columns, alive = index.columns(self._seen), index.alive(self._seen)
        rows = self._seen + np.flatnonzero(alive)
        self._seen += len(alive)
        keys = np.stack([columns[name][alive] for name in ("conversation", "sample", "window")], 1)
        places = np.searchsorted(self._sorted, _numbers(keys))
        self._row[self._order[places]] = rows
        if (self._row >= 0).all() and not index.inputs:
            self._writer.note(*self.texts.parts.values(), *self.texts.inputs.values())


def _numbers(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for each key of [n, 3]."""
    numbers: NDArray[np.int64] = keys[:, 0] * 2**28 + keys[:, 1] * 2**14 + keys[:, 2]
    return numbers

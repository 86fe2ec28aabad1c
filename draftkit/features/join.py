"""Several stores as one source, each with a weight: 1 takes its samples once in an epoch, 0.25 a fourth of
them, another fourth in the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from draftkit.errors import FeatureStoreError
from draftkit.features.source import FeatureSample
from draftkit.features.store import FeatureStore


class JoinedFeatures:
    """Stores one after the other. Raises FeatureStoreError when they hold numbers of different kinds."""

    ahead = True

    def __init__(self, stores: Sequence[FeatureStore], weights: Sequence[float]) -> None:
        self.name = " + ".join(store.name for store in stores)
        self._stores, self._share = stores, weights
        self._starts = np.cumsum([0, *map(len, stores)])
        first = stores[0]
        for store in stores[1:]:
            if store.manifest.form != first.manifest.form:
                kinds = f"{store.name} holds {store.manifest.dtype}, {first.name} {first.manifest.dtype}"
                raise FeatureStoreError(f"{kinds}; stores that are joined must hold the same, capture again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self) -> NDArray[np.int64]:
        """See `FeatureSource`."""
        return np.concatenate([store.lengths() for store in self._stores])

    def domains(self) -> Sequence[str]:
        """See `FeatureSource`."""
        return [domain for store in self._stores for domain in store.domains()]

    def conversations(self) -> NDArray[np.int64]:
        """See `FeatureSource`; conversations of different stores are different ones."""
        numbers, first = [], 0
        for store in self._stores:
            numbers.append(store.conversations() + first)
            first = int(numbers[-1].max()) + 1
        return np.concatenate(numbers)

    def weights(self) -> NDArray[np.float64]:
        """See `FeatureSource`."""
        return np.repeat(np.array(self._share, np.float64), [len(store) for store in self._stores])

    def made_from(self) -> dict[str, Any]:
        """See `FeatureSource`."""
        return {"joined": [[s.made_from(), w] for s, w in zip(self._stores, self._share, strict=True)]}

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource`."""
        store, place = self._at(index)
        return store.text(place)

    def read(self, indices: Sequence[int]) -> list[FeatureSample]:
        """See `FeatureSource`."""
        return [store[place] for store, place in map(self._at, indices)]

    def empty(self) -> FeatureSample:
        """See `FeatureSource`."""
        return self._stores[0].empty()

    def _at(self, index: int) -> tuple[FeatureStore, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._stores[number], index - int(self._starts[number])

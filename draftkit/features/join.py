"""Several sources as one, each with a weight: 1 takes its samples once in an epoch, 0.25 a fourth of
them, another fourth in the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from draftkit.errors import FeatureStoreError
from draftkit.features.source import FeatureSample, FeatureSource


class JoinedFeatures:
    """Sources one after the other. Raises FeatureStoreError when they hold numbers of different kinds."""

    ahead = True

    def __init__(self, sources: Sequence[FeatureSource], weights: Sequence[float]) -> None:
        self.name = " + ".join(source.name for source in sources)
        self._sources, self._share = sources, weights
        self._starts = np.cumsum([0, *map(len, sources)])
        first = sources[0].empty().features_TF
        for source in sources[1:]:
            other = source.empty().features_TF
            if (other.dtype, other.shape) != (first.dtype, first.shape):
                kinds = f"{source.name} holds {_kind(other)}, {sources[0].name} {_kind(first)}"
                raise FeatureStoreError(f"{kinds}; stores that are joined must hold the same, capture again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self) -> NDArray[np.int64]:
        """See `FeatureSource`."""
        return np.concatenate([source.lengths() for source in self._sources])

    def domains(self) -> Sequence[str]:
        """See `FeatureSource`."""
        return [domain for source in self._sources for domain in source.domains()]

    def conversations(self) -> NDArray[np.int64]:
        """See `FeatureSource`; conversations of different sources are different ones."""
        numbers, first = [], 0
        for source in self._sources:
            numbers.append(source.conversations() + first)
            first = int(numbers[-1].max()) + 1
        return np.concatenate(numbers)

    def weights(self) -> NDArray[np.float64]:
        """See `FeatureSource`."""
        return np.repeat(np.array(self._share, np.float64), [len(source) for source in self._sources])

    def made_from(self) -> dict[str, Any]:
        """See `FeatureSource`."""
        return {"joined": [[s.made_from(), w] for s, w in zip(self._sources, self._share, strict=True)]}

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource`."""
        source, place = self._at(index)
        return source.text(place)

    def read(self, indices: Sequence[int], last_hidden: bool = True) -> list[FeatureSample]:
        """See `FeatureSource`."""
        return [
            sample for source, place in map(self._at, indices) for sample in source.read([place], last_hidden)
        ]

    def empty(self) -> FeatureSample:
        """See `FeatureSource`."""
        return self._sources[0].empty()

    def _at(self, index: int) -> tuple[FeatureSource, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._sources[number], index - int(self._starts[number])


def _kind(features_TF: Tensor) -> str:
    return f"{str(features_TF.dtype).removeprefix('torch.')} of width {features_TF.shape[1]}"

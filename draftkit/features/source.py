"""The seam between features and training: whoever can give tokens, mask, features and last hidden states of
samples is a source. A store on disk is one (`store.py`), the target itself another (`live.py`).

Shapes: T tokens, F = K * H features of K layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class FeatureSample:
    """Tokens that training learns from: tokens int64 [T], loss_mask bool [T], features [T, F], last_hidden
    [T, H], the last two after the target has read the tokens up to there and all that stood before them.

    Features count from the first place to `context`, where the last anchor can be; last hidden states count
    before tokens of the mask. Elsewhere they may be zero.
    """

    id: str
    domain: str
    tokens_T: Tensor
    loss_mask_T: Tensor
    features_TF: Tensor
    last_hidden_TH: Tensor

    @property
    def context(self) -> int:
        """Places whose features some block can look at."""
        return context_of(self.loss_mask_T)


class FeatureSource(Protocol):
    """Samples by number, 0 to len - 1, in an order that is the same for every source of the same samples."""

    name: str  # what errors call it
    ahead: bool  # whether samples may be read in another thread, while the device computes

    def __len__(self) -> int: ...

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, without reading one."""
        ...

    def domains(self) -> Sequence[str]:
        """The domain of each sample."""
        ...

    def conversations(self) -> NDArray[np.int64]:
        """Numbers of the conversations that the samples are part of."""
        ...

    def weights(self) -> NDArray[np.float64]:
        """How often an epoch takes each sample: 1 is once, 0.25 every fourth time."""
        ...

    def made_from(self) -> dict[str, Any]:
        """What decides the values, for a run's fingerprint: equal for sources that give the same."""
        ...

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 [T] and loss mask bool [T] of a sample."""
        ...

    def read(self, indices: Sequence[int], last_hidden: bool = True) -> list[FeatureSample]:
        """Samples that are needed together; last hidden states that are not wanted may be [T, 0]. Raises
        FeatureStoreError, or another DraftkitError, where one cannot be given."""
        ...

    def empty(self) -> FeatureSample:
        """A sample of one token that teaches nothing, for a process that has none left."""
        ...


DOMAIN = "all"  # of samples whose writer knows no domains


class OthersSamples:
    """What folders of other tools do not say of their samples: each is a conversation of its own, of one
    domain, and taken once in an epoch. See `FeatureSource`."""

    def __len__(self) -> int:
        raise NotImplementedError

    def domains(self) -> Sequence[str]:
        """One for all."""
        return [DOMAIN] * len(self)

    def conversations(self) -> NDArray[np.int64]:
        """Each sample is a conversation."""
        return np.arange(len(self))

    def weights(self) -> NDArray[np.float64]:
        """Once each."""
        return np.ones(len(self))


def context_of(loss_mask_T: Tensor) -> int:
    """Places before the last anchor: a token the target wrote that is followed by another one. Features of
    later places are never looked at."""
    anchors = (loss_mask_T[:-1] & loss_mask_T[1:]).nonzero()
    return int(anchors[-1]) if len(anchors) else 0


def target_places(loss_mask_T: Tensor) -> Tensor:
    """Places whose last hidden state a loss needs, int64: those before a token that the target wrote."""
    return loss_mask_T[1:].nonzero().squeeze(-1)


def empty_sample(feature_width: int, hidden_size: int, dtype: torch.dtype) -> FeatureSample:
    """See `FeatureSource.empty`."""
    one = torch.zeros(1, dtype=torch.int64)
    width = (torch.zeros(1, feature_width, dtype=dtype), torch.zeros(1, hidden_size, dtype=dtype))
    return FeatureSample("", "", one, torch.zeros(1, dtype=torch.bool), *width)

"""How often tokens stand in training data, and the reduced draft vocabulary: those that the target writes
most often."""

from __future__ import annotations

import torch
from torch import Tensor

from draftkit.features.source import FeatureSource


def count_answer_tokens(source: FeatureSource, vocab_size: int) -> Tensor:
    """How often each token stands in an answer of the source, int64 [V]."""
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for index in range(len(source)):
        tokens_T, mask_T = source.text(index)
        counts_V += torch.bincount(tokens_T[mask_T], minlength=vocab_size)
    return counts_V


def count_tokens(source: FeatureSource, vocab_size: int) -> Tensor:
    """How often each token stands in the conversations of the source, int64 [V]."""
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for index in range(len(source)):
        counts_V += torch.bincount(source.text(index)[0], minlength=vocab_size)
    return counts_V


def choose_draft_vocabulary(counts_V: Tensor, size: int) -> Tensor:
    """The ids of the `size` most frequent tokens in ascending order, int64 [size]; of equals the smaller
    id."""
    return counts_V.sort(descending=True, stable=True).indices[:size].sort().values

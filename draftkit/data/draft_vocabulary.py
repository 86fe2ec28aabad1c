"""How often tokens stand in training data, and the reduced draft vocabulary: those that the target writes
most often."""

from __future__ import annotations

import torch
from torch import Tensor

from draftkit.data.features import FeatureStore


def count_answer_tokens(store: FeatureStore, vocab_size: int) -> Tensor:
    """How often each token stands in an answer of the store, int64 [V]."""
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for index in range(len(store)):
        sample = store[index]
        counts_V += torch.bincount(sample.tokens_T[sample.loss_mask_T], minlength=vocab_size)
    return counts_V


def count_tokens(store: FeatureStore, vocab_size: int) -> Tensor:
    """How often each token stands in the conversations of the store, int64 [V]."""
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for index in range(len(store)):
        counts_V += torch.bincount(store[index].tokens_T, minlength=vocab_size)
    return counts_V


def choose_draft_vocabulary(counts_V: Tensor, size: int) -> Tensor:
    """The ids of the `size` most frequent tokens in ascending order, int64 [size]; of equals the smaller
    id."""
    return counts_V.sort(descending=True, stable=True).indices[:size].sort().values

"""Sampling settings that differ by row: `ops.sampling.processed_probs` for a whole batch of requests at once.

Shapes: R requests, N rows of logits, M of them with a setting in use, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.request import SamplingParams


@dataclass(frozen=True)
class RowSampling:
    """Settings per row, [N, 1] each; None where no row uses the setting. `greedy` when every temperature is 0, `warm` when
    none is."""

    greedy: bool
    warm: bool = False
    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None

    def repeat(self, times_N: Tensor) -> RowSampling:
        """Row n becomes times_N[n] equal rows."""
        many = [None if t is None else t.repeat_interleave(times_N, 0) for t in self._tensors()]
        return RowSampling(self.greedy, self.warm, *many)

    def take(self, rows: Tensor) -> RowSampling:
        """The rows of these indices."""
        return RowSampling(self.greedy, self.warm, *[None if t is None else t[rows] for t in self._tensors()])

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.temperature, self.top_k, self.top_p, self.min_p


_ALL_GREEDY = RowSampling(True)


def row_sampling(params_R: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> RowSampling:
    """The settings of many requests."""
    if all(p.temperature == 0 for p in params_R):
        return _ALL_GREEDY

    def column(values: Sequence[float], off: float, dtype: type) -> Tensor | None:
        if all(v == off for v in values):
            return None
        return torch.from_numpy(np.array(values, dtype)[:, None]).to(device)

    top_k = [p.top_k if 0 < p.top_k < vocab_size else 0 for p in params_R]
    return RowSampling(
        False,
        all(p.temperature > 0 for p in params_R),
        column([p.temperature for p in params_R], -1.0, np.float64),
        column(top_k, 0, np.int64),
        column([p.top_p for p in params_R], 1.0, np.float64),
        column([p.min_p for p in params_R], 0.0, np.float64),
    )


def processed_rows(logits_NV: Tensor, rows: RowSampling) -> Tensor:
    """The distribution [N, V] of each row under its own settings; see `processed_probs` for their order and meaning."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if rows.temperature is None:
        return _one_hot(logits_NV)
    warm_N1 = rows.temperature > 0
    probs_NV = torch.softmax(logits_NV / rows.temperature.where(warm_N1, 1.0).to(logits_NV.dtype), -1)
    if rows.top_k is not None:
        _cut(probs_NV, rows.top_k > 0, rows.top_k, _top_k)
    if rows.top_p is not None:
        _cut(probs_NV, rows.top_p < 1, rows.top_p.to(probs_NV.dtype), _top_p)
    if rows.min_p is not None:
        _cut(probs_NV, rows.min_p > 0, rows.min_p.to(probs_NV.dtype), _min_p)
    return probs_NV if rows.warm else torch.where(warm_N1, probs_NV, _one_hot(logits_NV))


def _cut(probs_NV: Tensor, active_N1: Tensor, setting_N1: Tensor, kept: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In place, in the active rows alone (sorting all would cost most of a step): keep some tokens, scale to sum 1."""
    index_M = active_N1.squeeze(1).nonzero().squeeze(1)
    if len(index_M):
        chosen_MV = probs_NV[index_M]
        cut_MV = chosen_MV.where(kept(chosen_MV, setting_N1[index_M]), 0.0)
        probs_NV[index_M] = cut_MV / cut_MV.sum(-1, keepdim=True)


def _top_k(probs_MV: Tensor, top_k_M1: Tensor) -> Tensor:
    return probs_MV >= probs_MV.topk(int(top_k_M1.max()), -1).values.gather(-1, top_k_M1 - 1)


def _top_p(probs_MV: Tensor, top_p_M1: Tensor) -> Tensor:
    ordered, order = probs_MV.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the more likely tokens
    least = torch.finfo(probs_MV.dtype).tiny  # see `processed_probs`
    return torch.zeros_like(probs_MV, dtype=torch.bool).scatter_(-1, order, before < top_p_M1.clamp_min(least))


def _min_p(probs_MV: Tensor, min_p_M1: Tensor) -> Tensor:
    return probs_MV >= min_p_M1 * probs_MV.amax(-1, keepdim=True)


def _one_hot(logits_NV: Tensor) -> Tensor:
    return torch.zeros_like(logits_NV).scatter_(-1, logits_NV.argmax(-1, keepdim=True), 1.0)

"""From logits to the distribution that is sampled, and from a uniform number to a token.

The order is that of vLLM and Transformers: temperature, top-k, top-p, min-p, each on what the one before
left. All of them keep the largest logits, so a row's distribution is a softmax above a cut. Of logits equal
to the cut top-k and min-p keep all, top-p the first ones that it needs. A logit that is no number counts as
-infinity, and a row without a finite largest logit has all its mass on the first largest one.

On a CPU rows of float32 are described by a few numbers each and looked at where needed (`NativeRows`);
elsewhere, and without a compiler, they are made with PyTorch operations (`DenseRows`).

Shapes: N rows, V vocabulary; [...] is any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.ops.native_sampling import CHUNK, SETTING, NativeRows, native_rows


class SamplingLike(Protocol):
    """What shapes the distribution of a request."""

    @property
    def temperature(self) -> float:
        """0 is greedy."""
        ...

    @property
    def top_k(self) -> int:
        """0 is off, and so is what is no smaller than the vocabulary."""
        ...

    @property
    def top_p(self) -> float:
        """1 is off."""
        ...

    @property
    def min_p(self) -> float:
        """0 is off."""
        ...


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a request. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class DenseRows:
    """Distributions of rows as probabilities [N, V]."""

    probs_NV: Tensor

    def dense(self) -> Tensor:
        """Probabilities [N, V]."""
        return self.probs_NV

    def draw(self, uniforms_N: np.ndarray) -> Tensor:
        """One token of each row, int64 [N]; uniforms in [0, 1)."""
        return sample(
            self.probs_NV, torch.from_numpy(np.ascontiguousarray(uniforms_N)).to(self.probs_NV.device)
        )


Distributions = DenseRows | NativeRows
_SELECTED = 1024  # of the most likely tokens, where top-p ends for nearly all rows


def row_settings(settings_N: Sequence[SamplingLike]) -> np.ndarray:
    """Settings of many rows in one array, `SETTING` [N]."""
    return np.array([(s.temperature, s.top_p, s.min_p, s.top_k) for s in settings_N], SETTING)


def distributions(logits_NV: Tensor, settings_N: np.ndarray) -> Distributions:
    """The distribution of each row under its own settings, see `row_settings`. It may look at the logits
    later, so they must stay as they are."""
    return native_rows(logits_NV, settings_N) or DenseRows(_processed(logits_NV, settings_N))


def processed_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [..., V] that `sampling` draws from, float32 (float64 when the logits are)."""
    rows_NV = logits.reshape(-1, logits.shape[-1])
    return distributions(rows_NV, row_settings([sampling]).repeat(len(rows_NV))).dense().view(logits.shape)


def largest_prob(logits: Tensor) -> Tensor:
    """The largest probability of softmax(logits) [..., V], at temperature 1 and uncut: [...], float32 (or
    float64)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.exp(logits.amax(-1) - torch.logsumexp(logits, -1))


def sample(probs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Token ids [N] int64 by inverse CDF; a row's token depends on that row and its uniform in [0, 1) alone.

    The running sum is float64, over chunks first and then in the chunk where it exceeds the uniform; a token
    of probability zero never comes.
    """
    rows_N = torch.arange(len(probs_NV), device=probs_NV.device)
    chunks_NCS = F.pad(probs_NV, (0, -probs_NV.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    sums_NC = chunks_NCS.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted_N1 = uniforms_N[:, None].to(sums_NC) * sums_NC[:, -1:]
    chunk_N1 = torch.searchsorted(sums_NC, wanted_N1, right=True).clamp_(max=sums_NC.shape[1] - 1)
    chunk_NS = chunks_NCS[rows_N, chunk_N1.squeeze(1)].double()
    before_N1 = sums_NC.gather(1, chunk_N1) - chunk_NS.sum(-1, keepdim=True)
    within_N1 = (wanted_N1 - before_N1).clamp_min(0.0)
    place_N1 = torch.searchsorted(chunk_NS.cumsum(-1), within_N1, right=True)
    # rounding may lead to a token beyond the last one that can come
    last_N1 = ((chunk_NS > 0) * torch.arange(CHUNK, device=probs_NV.device)).amax(-1, keepdim=True)
    return (chunk_N1 * CHUNK + torch.minimum(place_N1, last_N1)).squeeze(1)


def request_generator(seed: int, index: int = 0) -> torch.Generator:
    """A CPU generator for one request: the same numbers in any batch and any number of processes."""
    generator = torch.Generator()
    generator.manual_seed(combined_seed(seed, index))
    return generator


def combined_seed(seed: int, index: int) -> int:
    """One seed in [0, 2^63) of a run's seed and a request's number."""
    return (seed * 1_000_003 + index) % 2**63


# --- with PyTorch operations; M rows have a setting in use


def _processed(logits_NV: Tensor, settings_N: np.ndarray) -> Tensor:
    """Probabilities [N, V]."""
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    wide_NV = wide_NV.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    one_hot_NV = torch.zeros_like(wide_NV).scatter_(-1, wide_NV.argmax(-1, keepdim=True), 1.0)
    if (settings_N["temperature"] == 0).all():
        return one_hot_NV
    top_N1 = wide_NV.amax(-1, keepdim=True)
    scaled_NV = wide_NV - top_N1
    heat_N1 = _column(np.where(settings_N["temperature"] > 0, settings_N["temperature"], 1.0), scaled_NV)
    top_k_N, vocab = settings_N["top_k"], wide_NV.shape[1]
    for used_N, cut in (
        ((top_k_N > 0) & (top_k_N < vocab), _cut_top_k),
        (settings_N["top_p"] < 1, _cut_top_p),
        (settings_N["min_p"] > 0, _cut_min_p),
    ):
        if used_N.any():  # in these rows alone: sorting all would cost most of a step
            index_M = torch.from_numpy(np.flatnonzero(used_N)).to(wide_NV.device)
            scaled_NV[index_M] = cut(scaled_NV[index_M], heat_N1[index_M], settings_N[used_N])
    single_N1 = _column(settings_N["temperature"] == 0, scaled_NV).bool() | ~top_N1.isfinite()
    return torch.where(single_N1, one_hot_NV, torch.softmax(scaled_NV / heat_N1, -1))


def _cut_top_k(scaled_MV: Tensor, _: Tensor, settings_M: np.ndarray) -> Tensor:
    top_k_M1 = torch.from_numpy(np.ascontiguousarray(settings_M["top_k"]))[:, None].to(scaled_MV.device)
    least_M1 = scaled_MV.topk(int(settings_M["top_k"].max()), -1).values.gather(-1, top_k_M1 - 1)
    return scaled_MV.where(scaled_MV >= least_M1, float("-inf"))


def _cut_top_p(scaled_MV: Tensor, heat_M1: Tensor, settings_M: np.ndarray) -> Tensor:
    total_M1 = torch.exp(scaled_MV / heat_M1).sum(-1, keepdim=True)
    # the most likely token stays
    top_p_M1 = _column(settings_M["top_p"], scaled_MV).clamp_min(torch.finfo(scaled_MV.dtype).tiny)
    vocab, selected = scaled_MV.shape[1], _SELECTED
    while True:  # more are selected for flat distributions alone
        best_MK = scaled_MV.topk(min(selected, vocab), -1).values
        probs_MK = torch.exp(best_MK / heat_M1) / total_M1
        before_MK = probs_MK.cumsum(-1) - probs_MK  # mass of the more likely tokens
        kept_M1 = (before_MK < top_p_M1).sum(-1, keepdim=True).clamp_min(1)  # 0 without any number
        if selected >= vocab or bool((kept_M1 < selected).all()):
            break
        selected *= 8
    cut_M1 = best_MK.gather(-1, kept_M1 - 1)
    equals_MV = scaled_MV == cut_M1
    left_M1 = kept_M1 - (best_MK > cut_M1).sum(-1, keepdim=True)  # of the equal ones the first
    kept_MV = (scaled_MV > cut_M1) | (equals_MV & (equals_MV.cumsum(-1, dtype=torch.int32) <= left_M1))
    return scaled_MV.where(kept_MV, float("-inf"))


def _cut_min_p(scaled_MV: Tensor, heat_M1: Tensor, settings_M: np.ndarray) -> Tensor:
    # the most likely token stays
    least_M1 = (_column(np.log(settings_M["min_p"]), scaled_MV) * heat_M1).clamp_max(0)
    return scaled_MV.where(scaled_MV >= least_M1, float("-inf"))


def _column(values_N: np.ndarray, like: Tensor) -> Tensor:
    """[N, 1] beside the rows `like`."""
    return torch.from_numpy(np.ascontiguousarray(values_N, np.float64))[:, None].to(like)

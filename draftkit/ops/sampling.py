"""From logits to the distribution that is sampled, and from a uniform number to a token.

Shapes: N rows, V vocabulary; [...] is any number of leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a request. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def processed_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [..., V] that `sampling` draws from, float32 (float64 when the logits are).

    Order as in vLLM and Transformers: temperature, top-k, top-p, min-p, each on what the one before left. Temperature 0
    is a one-hot at the first largest logit, so that greedy and sampled decoding are one rule.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = torch.softmax(logits / sampling.temperature, -1)
    if 0 < sampling.top_k < probs.shape[-1]:
        smallest = probs.topk(sampling.top_k, -1).values[..., -1:]
        probs = _renormalise(probs.where(probs >= smallest, 0.0))
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # mass of the more likely tokens
        top_p = max(sampling.top_p, torch.finfo(probs.dtype).tiny)  # the most likely token stays, whatever float32 makes of it
        probs = _renormalise(torch.zeros_like(probs).scatter_(-1, order, ordered.where(before < top_p, 0.0)))
    if sampling.min_p > 0:
        probs = _renormalise(probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0))
    return probs


def largest_prob(logits: Tensor) -> Tensor:
    """The largest probability of softmax(logits) [..., V], at temperature 1 and uncut: [...], float32 (or float64)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.exp(logits.amax(-1) - torch.logsumexp(logits, -1))


def sample(probs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Token ids [N] int64 by inverse CDF; a row's token depends on that row and its uniform in [0, 1) alone.

    The running sum is float64 and the first sum above the uniform is taken: a token of probability zero never comes.
    """
    sums_NV = probs_NV.double().cumsum(-1)
    wanted_N1 = uniforms_N[:, None].to(sums_NV) * sums_NV[:, -1:]
    return torch.searchsorted(sums_NV, wanted_N1, right=True).squeeze(-1).clamp_(max=probs_NV.shape[-1] - 1)


def request_generator(seed: int, index: int = 0) -> torch.Generator:
    """A CPU generator for one request: the same numbers in any batch and any number of processes."""
    generator = torch.Generator()
    generator.manual_seed(combined_seed(seed, index))
    return generator


def combined_seed(seed: int, index: int) -> int:
    """One seed in [0, 2^63) of a run's seed and a request's number."""
    return (seed * 1_000_003 + index) % 2**63


def _renormalise(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True)

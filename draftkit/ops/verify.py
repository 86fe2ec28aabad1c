"""Exact verification of proposals: which drafted tokens to keep, and which token the target adds.

A rule looks at three things of a proposal: p(x) / q(x) of each drafted token, sums of residual rows max(0, w
p - q), and the one residual row of the place where the proposal ends, which the next token is drawn from.
`verify` draws; the exhaustive proof of exactness sums over the same functions. Temperature 0 is a one-hot
target row, a greedy draft a one-hot draft row, and plain decoding a proposal of length 0. Where rows of
logits are described instead of made, `native_sampling.NativeProposals` draws the token rule's verdicts.

Shapes: R requests, G = gamma drafted positions, V vocabulary. `lengths_R` is how many drafted tokens of each
request are verified (0..G); what lies after it is ignored. p is [R, G + 1, V] (target, after the sampling
settings), q is [R, G, V] (drafter, the very distribution that was sampled from).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draftkit.ops.sampling import sample


@dataclass(frozen=True)
class Rule:
    """A verification rule. `weights(ratios) -> [R, G + 1]` are what p counts in the residual of each
    position; `length_distribution(ratios, weights, surplus, lengths) -> [R, G + 1]` is the distribution of
    the number of accepted tokens, zero past the lengths, where `surplus()` gives the sums of residuals for a
    rule that asks."""

    name: str
    weights: Callable[[Tensor], Tensor]
    length_distribution: Callable[[Tensor, Tensor, Callable[[], Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Verdict:
    """How many drafted tokens are kept, int64 [R], and the target's token after them, int64 [R]."""

    accepted_R: Tensor
    next_token_R: Tensor


def verify(rule: Rule, proposals: DenseProposals, uniforms_R2: Tensor) -> Verdict:
    """Draw the verdict: the first uniform of a request picks the length, the second the token."""
    counted_RG, weights_RG = length_distribution(rule, proposals)
    reached_RG = counted_RG.double().cumsum(-1)  # float32 would round a uniform up to 1
    passed_RG = reached_RG <= uniforms_R2[:, :1].to(reached_RG) * reached_RG[:, -1:]
    accepted_R = torch.minimum(passed_RG.sum(-1), proposals.lengths_R)
    weights_R = weights_RG.gather(1, accepted_R[:, None]).squeeze(1)
    return Verdict(accepted_R, proposals.draw(accepted_R, weights_R, uniforms_R2[:, 1]))


def length_distribution(rule: Rule, proposals: DenseProposals) -> tuple[Tensor, Tensor]:
    """The distribution of the number of accepted tokens, and the weights of each position's residual, both
    [R, G + 1]."""
    ratios_RG = proposals.ratios()
    weights_RG = rule.weights(ratios_RG)
    counted_RG = rule.length_distribution(
        ratios_RG, weights_RG, lambda: proposals.surplus(weights_RG[:, :-1]), proposals.lengths_R
    )
    return counted_RG, weights_RG


@dataclass(frozen=True)
class DenseProposals:
    """Proposals with all distributions made: drafted tokens [R, G], p [R, G + 1, V], q [R, G, V], lengths
    [R]."""

    tokens_RG: Tensor
    p_RGV: Tensor
    q_RGV: Tensor
    lengths_R: Tensor

    def ratios(self) -> Tensor:
        """p(x) / q(x) of the drafted tokens [R, G]; 0 where the drafter could not have drawn the token."""
        index = self.tokens_RG[..., None]
        p_RG = self.p_RGV[:, : self.tokens_RG.shape[1]].gather(-1, index).squeeze(-1)
        q_RG = self.q_RGV.gather(-1, index).squeeze(-1).to(p_RG)
        return torch.where(q_RG > 0, p_RG / q_RG, 0.0)

    def surplus(self, weights_RG: Tensor) -> Tensor:
        """sum over tokens of max(0, w p - q) at every drafted position, [R, G]."""
        p_RGV = self.p_RGV[:, : self.tokens_RG.shape[1]]
        return (weights_RG[..., None] * p_RGV - self.q_RGV.to(p_RGV)).clamp_min(0.0).sum(-1)

    def draw(self, accepted_R: Tensor, weights_R: Tensor, uniforms_R: Tensor) -> Tensor:
        """The token after the accepted ones [R]: from max(0, w p - q), scaled to sum 1, at the first refused
        position, or from p after the last verified one."""
        return sample(self.next_token_distribution(accepted_R, weights_R), uniforms_R)

    def next_token_distribution(self, accepted_R: Tensor, weights_R: Tensor) -> Tensor:
        """What `draw` draws from, [R, V]."""
        rows = torch.arange(len(accepted_R), device=accepted_R.device)
        p_RV, gamma = self.p_RGV[rows, accepted_R], self.tokens_RG.shape[1]
        if not gamma:
            return p_RV
        q_RV = self.q_RGV[rows, accepted_R.clamp_max(gamma - 1)].to(p_RV)
        residual_RV = _normalise((weights_R[:, None] * p_RV - q_RV).clamp_min(0.0), p_RV)
        return torch.where((accepted_R < self.lengths_R)[:, None], residual_RV, p_RV)


def _normalise(residual_RV: Tensor, fallback_RV: Tensor) -> Tensor:
    """Rows scaled to sum 1; an all-zero row can only come from rounding (p = q) and becomes the target's own
    row."""
    total_R1 = residual_RV.sum(-1, keepdim=True)
    return torch.where(
        total_R1 > 0, residual_RV / total_R1.clamp_min(torch.finfo(total_R1.dtype).tiny), fallback_RV
    )


def _with_one(values_RG: Tensor) -> Tensor:
    """[R, G + 1], 1 in front."""
    return torch.cat([values_RG.new_ones(len(values_RG), 1), values_RG], -1)


# --- token-wise rejection sampling: accept x_k with probability min(1, p(x_k) / q(x_k)), stop at a rejection


def _token_weights(ratios_RG: Tensor) -> Tensor:
    return _with_one(torch.ones_like(ratios_RG))


def _token_length_distribution(
    ratios_RG: Tensor, weights_RG: Tensor, surplus: Callable[[], Tensor], lengths_R: Tensor
) -> Tensor:
    verified_RG = torch.arange(ratios_RG.shape[1], device=lengths_R.device) < lengths_R[:, None]
    reached_RG = _with_one((ratios_RG.clamp_max(1.0) * verified_RG).cumprod(-1))  # P(accepted >= n)
    return reached_RG - torch.cat([reached_RG[:, 1:], torch.zeros_like(reached_RG[:, :1])], -1)


# --- block verification (Sun et al., arXiv 2403.10444, Algorithm 2): prefixes are accepted jointly


def _block_weights(ratios_RG: Tensor) -> Tensor:
    """w_0 = 1, w_i = min(1, w_{i-1} p(x_i) / q(x_i)): [R, G + 1]."""
    weights = [ratios_RG.new_ones(len(ratios_RG))]
    for ratio_R in ratios_RG.unbind(-1):
        weights.append((weights[-1] * ratio_R).clamp_max(1.0))
    return torch.stack(weights, -1)


def _block_length_distribution(
    ratios_RG: Tensor, weights_RG: Tensor, surplus: Callable[[], Tensor], lengths_R: Tensor
) -> Tensor:
    surplus_RG = surplus()
    room_RG = surplus_RG + 1.0 - weights_RG[:, :-1]
    # h_i: keep at least i tokens, decided from the longest prefix down. 0 / 0 means p = q after a fully
    # accepted prefix: then a longer prefix is always kept, so the value does not matter.
    inner_RG = torch.where(room_RG > 0, surplus_RG / room_RG.clamp_min(torch.finfo(room_RG.dtype).tiny), 0.0)
    keep = torch.cat([inner_RG, torch.zeros_like(weights_RG[:, :1])], -1)
    position = torch.arange(keep.shape[1], device=lengths_R.device)
    keep = torch.where(position == lengths_R[:, None], weights_RG, keep)
    keep = torch.where(position > lengths_R[:, None], 0.0, keep)
    keep = torch.where(position == 0, 1.0, keep)
    refused = (1.0 - keep).flip(-1).cumprod(-1).flip(-1)  # prod over i >= n
    later = torch.cat([refused[:, 1:], torch.ones_like(refused[:, :1])], -1)
    return keep * later


TOKEN_RULE = Rule("token", _token_weights, _token_length_distribution)
BLOCK_RULE = Rule("block", _block_weights, _block_length_distribution)
RULES = {rule.name: rule for rule in (TOKEN_RULE, BLOCK_RULE)}

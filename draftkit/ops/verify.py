"""Exact verification of proposals: which drafted tokens to keep, and which token the target adds.

A rule is two pure functions: the law of the number of accepted tokens, given the proposal, and the law of the token
that follows them. `verify` draws from them; the exhaustive proof of exactness sums over them. Temperature 0 is a one-hot
target row, a greedy draft a one-hot draft row, and plain decoding a proposal of length 0.

Shapes: R requests, G = gamma drafted positions, V vocabulary. `lengths_R` is how many drafted tokens of each request are
verified (0..G); what lies behind it is ignored. p is [R, G + 1, V] (target, after the sampling settings), q is [R, G, V]
(drafter, the very distribution that was sampled from).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draftkit.ops.sampling import sample

LengthLaw = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NextTokenLaw = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """A verification rule. `length_law(tokens_RG, p, q, lengths_R) -> [R, G + 1]`, zero past `lengths_R`;
    `next_token_law(accepted_R, tokens_RG, p, q, lengths_R) -> [R, V]`. Rows of both sum to 1."""

    name: str
    length_law: LengthLaw
    next_token_law: NextTokenLaw


@dataclass(frozen=True)
class Verdict:
    """How many drafted tokens are kept, int64 [R], and the target's token behind them, int64 [R]."""

    accepted_R: Tensor
    next_token_R: Tensor


def verify(
    rule: Rule, tokens_RG: Tensor, p_RGV: Tensor, q_RGV: Tensor, lengths_R: Tensor, uniforms_R2: Tensor
) -> Verdict:
    """Draw the verdict: the first uniform of a request picks the length, the second the token."""
    accepted_R = sample(rule.length_law(tokens_RG, p_RGV, q_RGV, lengths_R), uniforms_R2[:, 0])
    next_law_RV = rule.next_token_law(accepted_R, tokens_RG, p_RGV, q_RGV, lengths_R)
    return Verdict(accepted_R, sample(next_law_RV, uniforms_R2[:, 1]))


def _ratios(tokens_RG: Tensor, p_RGV: Tensor, q_RGV: Tensor) -> Tensor:
    """p(x) / q(x) of the drafted tokens [R, G]; 0 where the drafter could not have drawn the token."""
    index = tokens_RG[..., None]
    p_RG = p_RGV[:, : tokens_RG.shape[1]].gather(-1, index).squeeze(-1)
    q_RG = q_RGV.gather(-1, index).squeeze(-1).to(p_RG)
    return torch.where(q_RG > 0, p_RG / q_RG, 0.0)


def _verified(lengths_R: Tensor, gamma: int) -> Tensor:
    return torch.arange(gamma, device=lengths_R.device) < lengths_R[:, None]


def _row(values_RGV: Tensor, accepted_R: Tensor) -> Tensor:
    """values[r, accepted[r]], with zeros where the position does not exist."""
    padded = torch.cat([values_RGV, torch.zeros_like(values_RGV[:, :1])], 1) if values_RGV.shape[1] else None
    if padded is None:
        return values_RGV.new_zeros(values_RGV.shape[0], values_RGV.shape[2])
    return padded[torch.arange(len(accepted_R)), accepted_R]


def _normalise(residual_RV: Tensor, fallback_RV: Tensor) -> Tensor:
    """Rows scaled to sum 1; an all-zero row can only come from rounding (p = q) and becomes the target's own row."""
    total_R1 = residual_RV.sum(-1, keepdim=True)
    return torch.where(total_R1 > 0, residual_RV / total_R1.clamp_min(torch.finfo(total_R1.dtype).tiny), fallback_RV)


# --- token-wise rejection sampling: accept x_k with probability min(1, p(x_k) / q(x_k)), stop at the first rejection


def _token_length_law(tokens_RG: Tensor, p_RGV: Tensor, q_RGV: Tensor, lengths_R: Tensor) -> Tensor:
    accept_RG = _ratios(tokens_RG, p_RGV, q_RGV).clamp_max(1.0)
    accept_RG = accept_RG * _verified(lengths_R, tokens_RG.shape[1])
    one_R1 = torch.ones_like(p_RGV[:, :1, 0])
    reached = torch.cat([one_R1, accept_RG.cumprod(-1)], -1)  # P(accepted >= n)
    return reached - torch.cat([reached[:, 1:], torch.zeros_like(one_R1)], -1)


def _token_next_law(accepted_R: Tensor, tokens_RG: Tensor, p_RGV: Tensor, q_RGV: Tensor, lengths_R: Tensor) -> Tensor:
    p_RV, q_RV = _row(p_RGV, accepted_R), _row(q_RGV, accepted_R).to(p_RGV)
    residual_RV = _normalise((p_RV - q_RV).clamp_min(0.0), p_RV)
    return torch.where((accepted_R < lengths_R)[:, None], residual_RV, p_RV)


# --- block verification (Sun et al., arXiv 2403.10444, Algorithm 2): prefixes are accepted jointly


def _block_weights(tokens_RG: Tensor, p_RGV: Tensor, q_RGV: Tensor) -> Tensor:
    """w_0 = 1, w_i = min(1, w_{i-1} p(x_i) / q(x_i)): [R, G + 1]."""
    weight_R = torch.ones_like(p_RGV[:, 0, 0])
    weights = [weight_R]
    for ratio_R in _ratios(tokens_RG, p_RGV, q_RGV).unbind(-1):
        weight_R = (weight_R * ratio_R).clamp_max(1.0)
        weights.append(weight_R)
    return torch.stack(weights, -1)


def _block_length_law(tokens_RG: Tensor, p_RGV: Tensor, q_RGV: Tensor, lengths_R: Tensor) -> Tensor:
    gamma = tokens_RG.shape[1]
    weights = _block_weights(tokens_RG, p_RGV, q_RGV)
    surplus_RG = (weights[:, :gamma, None] * p_RGV[:, :gamma] - q_RGV.to(p_RGV)).clamp_min(0.0).sum(-1)
    room_RG = surplus_RG + 1.0 - weights[:, :gamma]
    # h_i: keep at least i tokens, decided from the longest prefix down. 0 / 0 means p = q behind a fully accepted
    # prefix: then a longer prefix is always kept, so the value does not matter.
    inner_RG = torch.where(room_RG > 0, surplus_RG / room_RG.clamp_min(torch.finfo(room_RG.dtype).tiny), 0.0)
    keep = torch.cat([inner_RG, torch.zeros_like(weights[:, :1])], -1)
    position = torch.arange(gamma + 1, device=lengths_R.device)
    keep = torch.where(position == lengths_R[:, None], weights, keep)
    keep = torch.where(position > lengths_R[:, None], 0.0, keep)
    keep = torch.where(position == 0, 1.0, keep)
    refused = (1.0 - keep).flip(-1).cumprod(-1).flip(-1)  # prod over i >= n
    behind = torch.cat([refused[:, 1:], torch.ones_like(refused[:, :1])], -1)
    return keep * behind


def _block_next_law(accepted_R: Tensor, tokens_RG: Tensor, p_RGV: Tensor, q_RGV: Tensor, lengths_R: Tensor) -> Tensor:
    p_RV, q_RV = _row(p_RGV, accepted_R), _row(q_RGV, accepted_R).to(p_RGV)
    weight_R1 = _block_weights(tokens_RG, p_RGV, q_RGV).gather(1, accepted_R[:, None])
    residual_RV = _normalise((weight_R1 * p_RV - q_RV).clamp_min(0.0), p_RV)
    return torch.where((accepted_R < lengths_R)[:, None], residual_RV, p_RV)


TOKEN_RULE = Rule("token", _token_length_law, _token_next_law)
BLOCK_RULE = Rule("block", _block_length_law, _block_next_law)
RULES = {rule.name: rule for rule in (TOKEN_RULE, BLOCK_RULE)}

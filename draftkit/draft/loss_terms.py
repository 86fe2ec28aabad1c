"""The terms of a distillation loss and their gradients, for rows whose logits are there.

With z the draft logits of a row, q = softmax(z), p the target's distribution and x* the token that follows,
    CE = -log q(x*)                d CE / dz = q - onehot(x*)
    TV = sum |q - p|               d TV / dz = q (s - sum(q s)),  s = sign(q - p)
    KL = sum p log(p / q)          d KL / dz = q - p
    LK = l KL + (1 - l) TV / 2     l = exp(-3 a), a = 1 - TV / 2 the acceptance rate; l is a constant
      (arXiv 2602.23881)

A drafter with a reduced vocabulary has q = 0 outside it: TV then includes the target's mass there, so that
acceptance rates stay exact; KL is taken to p renormalised inside, and rows whose x* lies outside have no
CE.

A row's weight is w_k = exp(-(k - 1) / decay) of its position, or D-PACE's (arXiv 2605.18810, eq. 7 and 8):
with the drafter's own smoothed confidence c_i = (1 - alpha) q_i(x*_i) + alpha, w_k = sum_{m >= k} prod_{i
<= m} c_i, a constant. D-PACE's credit must not cancel: the denominator of the mean stays that of the fixed
weights.

Shapes: n rows of whole blocks, V vocabulary, W draft vocabulary, G = gamma block positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.settings import LossSettings

LK_SHARPNESS = 3.0
DPACE_ALPHA = 0.5


def position_weights(settings: LossSettings, gamma: int) -> Tensor:
    """w_k = exp(-(k - 1) / decay) for k = 1..gamma, float32 [G]."""
    return torch.exp(-torch.arange(gamma, dtype=torch.float32) / settings.decay)


def needs_target(settings: LossSettings) -> bool:
    """Whether a term compares with the target's distribution, and not with its tokens alone."""
    return bool(settings.tv or settings.kl or settings.lk)


def terms_and_gradient(
    logits_nV: Tensor,
    target_nV: Tensor,
    token_n1: Tensor,
    grid_n: Tensor,
    weight_n: Tensor,
    gamma: int,
    draft_ids_W: Tensor | None,
    settings: LossSettings,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weighted loss, CE, TV and KL of the rows of whole blocks, [4, n]; and the gradient by z, [n, V]."""
    needs_kl = settings.kl > 0 or settings.lk > 0
    log_q = torch.log_softmax(logits_nV, -1)
    p = outside_n = None
    if draft_ids_W is not None:
        p = torch.softmax(target_nV, -1)[:, draft_ids_W]
        target_nV, outside_n = target_nV[:, draft_ids_W], 1 - p.sum(-1)
    log_inside = torch.log_softmax(target_nV, -1)
    inside = log_inside.exp()
    p = inside if p is None else p
    known_n, token_n1 = token_n1[:, 0] >= 0, token_n1.clamp_min(0)
    ce = (-log_q.gather(-1, token_n1).squeeze(-1)).masked_fill(~known_n, float("inf"))
    kl = log_inside.sub_(log_q).mul_(inside).sum(-1) if needs_kl else torch.zeros_like(ce)
    q = log_q.exp_()
    difference = q - p
    tv = difference.abs().sum(-1)
    if outside_n is not None:
        tv = tv + outside_n
    by_ce, by_tv, by_kl = term_weights(ce, tv, grid_n, weight_n, gamma, settings)
    ce, by_ce = ce.where(known_n, 0.0), by_ce * known_n
    values = row_values((by_ce, by_tv, by_kl), ce, tv, kl)
    if not with_gradient:
        return values, None
    gradient = difference.sign_().mul_(q)
    inner = by_ce + by_kl - by_tv * gradient.sum(-1)
    gradient.mul_(by_tv[:, None]).addcmul_(q, inner[:, None])
    if needs_kl:
        gradient.addcmul_(inside, by_kl[:, None], value=-1)
    return values, gradient.scatter_add_(-1, token_n1, -by_ce[:, None])


def ce_and_gradient(
    logits_nV: Tensor, token_n1: Tensor, grid_n: Tensor, weight_n: Tensor, gamma: int, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """`terms_and_gradient` without a target: CE alone."""
    log_q = torch.log_softmax(logits_nV, -1)
    known_n, token_n1 = token_n1[:, 0] >= 0, token_n1.clamp_min(0)
    ce = (-log_q.gather(-1, token_n1).squeeze(-1)).masked_fill(~known_n, float("inf"))
    by_ce, *_ = term_weights(ce, torch.zeros_like(ce), grid_n, weight_n, gamma, settings)
    ce, by_ce = ce.where(known_n, 0.0), by_ce * known_n
    unknown = torch.full_like(ce, float("nan"))
    gradient = log_q.exp_().mul_(by_ce[:, None]).scatter_add_(-1, token_n1, -by_ce[:, None])
    return torch.stack([by_ce * ce, ce, unknown, unknown]), gradient


def term_weights(
    ce_n: Tensor, tv_n: Tensor, grid_n: Tensor, weight_n: Tensor, gamma: int, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """What CE, TV and KL of each row count in the objective, [n] each; LK counts as its parts."""
    weight = weight_n
    if settings.weighting == "dpace":
        weight = weight * dpace_weights(ce_n, grid_n, gamma)
    share = torch.exp(-LK_SHARPNESS * (1 - tv_n / 2).clamp(0, 1))
    by_tv = weight * (settings.tv + settings.lk * (1 - share) / 2)
    return weight * settings.ce, by_tv, weight * (settings.kl + settings.lk * share)


def row_values(shares: tuple[Tensor, Tensor, Tensor], ce_n: Tensor, tv_n: Tensor, kl_n: Tensor) -> Tensor:
    """Weighted loss, CE, TV and KL of the rows, [4, n]."""
    by_ce, by_tv, by_kl = shares
    return torch.stack([by_ce * ce_n + by_tv * tv_n + by_kl * kl_n, ce_n, tv_n, kl_n])


def dpace_weights(ce_n: Tensor, grid_n: Tensor, gamma: int) -> Tensor:
    """D-PACE's weights [n] of the rows of whole blocks, from each row's CE."""
    slot_n, number_n = grid_n % gamma, grid_n // gamma
    block_n = F.pad((number_n[1:] != number_n[:-1]).long().cumsum(0), (1, 0))  # counted among these
    # 0 after a block's end: nothing is gained there
    confidence = ce_n.new_zeros(len(ce_n), gamma)
    confidence[block_n, slot_n] = (1 - DPACE_ALPHA) * torch.exp(-ce_n) + DPACE_ALPHA
    gained = confidence.cumprod(-1)
    return gained.flip(-1).cumsum(-1).flip(-1)[block_n, slot_n]

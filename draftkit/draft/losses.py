"""The distillation loss in chunks of rows: no [rows, vocabulary] tensor is ever whole.

Draft logits are z = W h + W_2 m with the target's frozen head W; the target's are W t. Both loss terms have closed
gradients in z, so each chunk computes them while its logits exist, and backward only scales what was kept:
    CE = -log q(x*)          d CE / dz = q - onehot(x*)
    TV = sum |q - p|         d TV / dz = q * (s - sum(q s)),  s = sign(q - p)
Shapes: N rows (drafted positions that count), H hidden, r Markov rank, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 512


class _ChunkedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        markov_Nr: Tensor | None,
        w2_Vr: Tensor | None,
        head_VH: Tensor,
        target_hidden_NH: Tensor,
        tokens_N: Tensor,
        ce_weight_N: Tensor,
        tv_weight_N: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(tokens_N)
        ce_N, tv_N = (torch.empty(rows, dtype=torch.float32, device=hidden_NH.device) for _ in range(2))
        grad_h = torch.empty_like(hidden_NH)
        grad_m = torch.empty_like(markov_Nr) if markov_Nr is not None else None
        grad_w2 = torch.zeros_like(w2_Vr) if w2_Vr is not None else None
        for start in range(0, rows, CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = hidden_NH[part] @ head_VH.T
            if markov_Nr is not None and w2_Vr is not None:
                logits = logits.addmm_(markov_Nr[part], w2_Vr.T)
            log_q = torch.log_softmax(logits.float(), -1)
            p = torch.softmax((target_hidden_NH[part] @ head_VH.T).float(), -1)
            token = tokens_N[part, None]
            ce_N[part] = -log_q.gather(-1, token).squeeze(-1)
            q = log_q.exp_()
            difference = p.sub_(q).neg_()
            tv_N[part] = difference.abs().sum(-1)
            sign = difference.sign_()
            grad = sign.sub_((q * sign).sum(-1, keepdim=True)).mul_(tv_weight_N[part, None]).add_(ce_weight_N[part, None])
            grad.mul_(q).scatter_add_(-1, token, -ce_weight_N[part, None])
            grad = grad.to(hidden_NH.dtype)
            grad_h[part] = grad @ head_VH
            if markov_Nr is not None and w2_Vr is not None and grad_m is not None and grad_w2 is not None:
                grad_m[part] = grad @ w2_Vr
                grad_w2.addmm_(grad.T, markov_Nr[part])
        ctx.grads = (grad_h, grad_m, grad_w2)
        loss = (ce_weight_N * ce_N).sum() + (tv_weight_N * tv_N).sum()
        ctx.mark_non_differentiable(ce_N, tv_N)
        return loss, ce_N, tv_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = tuple(None if g is None else g * grad_loss for g in ctx.grads)
        return (*scaled, None, None, None, None, None)


def distillation_loss(
    hidden_NH: Tensor,
    markov_Nr: Tensor | None,
    w2_Vr: Tensor | None,
    head_VH: Tensor,
    target_hidden_NH: Tensor,
    tokens_N: Tensor,
    ce_weight_N: Tensor,
    tv_weight_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(ce_weight * CE + tv_weight * TV) with gradients for `hidden`, `markov` and `w2`; and, without gradients, CE
    and TV = |q - p|_1 of every row, float32 [N]. The acceptance rate of a row is 1 - TV / 2."""
    out: tuple[Tensor, Tensor, Tensor] = _ChunkedDistillation.apply(
        hidden_NH, markov_Nr, w2_Vr, head_VH, target_hidden_NH, tokens_N, ce_weight_N, tv_weight_N
    )
    return out

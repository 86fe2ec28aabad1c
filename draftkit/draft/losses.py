"""The distillation losses, computed in chunks of rows: no [rows, vocabulary] tensor is ever whole.

A row n is one drafted position that counts. Its draft logits are z = head(h) + W_2 m, the target's are
head(t), with the target's frozen head(x) = cap * tanh(scale W x / cap), or scale W x where the family has
no cap. The gradients by z are known in closed form (`loss_terms.py`), so each chunk leaves them while its
logits exist, and backward only scales what was kept.

Where only CE is asked for, the target need not be known (t has no numbers): TV and KL are then NaN.

Shapes: N rows, H hidden, r Markov rank, V vocabulary, G block positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.draft.loss_chunks import Chunk, Chunks, cut_rows
from draftkit.draft.loss_terms import (
    ce_and_gradient,
    position_weights,
    row_values,
    term_weights,
    terms_and_gradient,
)
from draftkit.ops.compiled import for_device
from draftkit.ops.native_training import RowDistances, native_fits
from draftkit.settings import LossSettings

CHUNK_ROWS = 512  # rows of one product with the vocabulary, where that many logits are
CHUNK_LOGITS = 2**25  # no more than this: what bounds the memory
SLICE_LOGITS = 2**18  # worked on at once on a CPU: what a core's cache holds


@dataclass(frozen=True)
class Head:
    """The target's output head: weight [V, H], the family's factor and soft cap on the logits."""

    weight_VH: Tensor
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm [..., H] to logits [..., V]."""
        raw = F.linear(hidden, self.weight_VH.to(hidden.dtype))
        if self.scale != 1:
            raw = raw.mul_(self.scale)
        return raw.div_(self.soft_cap).tanh_().mul_(self.soft_cap) if self.soft_cap else raw


@dataclass(frozen=True)
class Rows:
    """The rows that count, in ascending order of `grid_N`.

    `grid_N` is the place of a row in the [blocks, G] grid of all drafted positions; `markov` is (m [N, r],
    W_2 [V, r]) or None.
    """

    hidden_NH: Tensor
    head: Head
    markov: tuple[Tensor, Tensor] | None
    target_hidden_NH: Tensor  # [N, 0]: not known
    target_head: Head
    tokens_N: Tensor  # int64, x* as the drafter's head counts; -1 is outside its vocabulary
    grid_N: Tensor  # int64
    gamma: int
    place_N: Tensor  # int64; rows with one number have one target state, whose logits are made once per chunk
    draft_ids_W: Tensor | None = None  # target ids of a reduced draft vocabulary, the rows of `head`
    scale_N: Tensor | None = None  # a factor of each row's weight, whatever its position


@dataclass(frozen=True)
class RowLosses:
    """The weighted sum with gradients; and every row's CE, TV = |q - p|_1 and KL (0 where not asked for)
    without, float32 [N]."""

    loss: Tensor
    ce_N: Tensor
    tv_N: Tensor
    kl_N: Tensor
    compared: bool  # with the target's distribution

    def sums(self, weights_N: Tensor) -> dict[str, Tensor]:
        """Weighted sums of the terms that are known, for the log."""
        terms = {"ce": self.ce_N} | ({"tv": self.tv_N, "kl": self.kl_N} if self.compared else {})
        return {name: weights_N @ value_N for name, value_N in terms.items()}

    @property
    def accept_N(self) -> Tensor:
        """The analytic acceptance rates 1 - TV / 2."""
        return (1 - self.tv_N / 2).clamp(0, 1)


def distillation_loss(rows: Rows, settings: LossSettings) -> RowLosses:
    """sum_n w_n (ce CE + tv TV + kl KL + lk LK), differentiable in `hidden`, m and W_2."""
    m_Nr, w2_Vr = rows.markov or (None, None)
    inputs = (rows.hidden_NH, m_Nr, w2_Vr)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs)
    compared = bool(rows.target_hidden_NH.shape[1])
    loss, ce_N, tv_N, kl_N = _Distillation.apply(*inputs, rows, settings, wanted)
    return RowLosses(loss, ce_N, tv_N, kl_N, compared)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        m_Nr: Tensor | None,
        w2_Vr: Tensor | None,
        rows: Rows,
        settings: LossSettings,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(rows.tokens_N.device.type, enabled=False):
            values_4N, ctx.gradients = _all_chunks(rows, settings, wanted)
        loss, ce_N, tv_N, kl_N = values_4N[0].sum(), *values_4N[1:].unbind()
        ctx.mark_non_differentiable(ce_N, tv_N, kl_N)
        return loss, ce_N, tv_N, kl_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # scaled in place: a second backward would scale them twice
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss were used; compute the loss again")
        return (*(g if g is None else g.mul_(grad_loss) for g in gradients), None, None, None)


def _all_chunks(
    rows: Rows, settings: LossSettings, wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """Weighted loss, CE, TV and KL of every row, float32 [4, N]; gradients of hidden, m and W_2 where
    wanted."""
    sources = (rows.hidden_NH, *(rows.markov or (None, None)))
    gradients = [
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32) if i == 2 else t.dtype)
        if t is not None and need
        else None
        for i, (t, need) in enumerate(zip(sources, wanted, strict=True))
    ]
    vocabulary, device = len(rows.target_head.weight_VH), rows.tokens_N.device
    accuracy = torch.promote_types(rows.target_hidden_NH.dtype, torch.float32)
    values_4N = torch.zeros(4, len(rows.tokens_N), dtype=accuracy, device=device)
    weight_N = _fixed_weights(rows, settings).to(values_4N)
    chunk_rows = min(CHUNK_ROWS, CHUNK_LOGITS // vocabulary)
    slice_rows = SLICE_LOGITS // vocabulary if device.type == "cpu" else chunk_rows
    chunks = cut_rows(rows.grid_N, rows.place_N, rows.gamma, chunk_rows, slice_rows)
    for chunk in chunks.parts:
        _one_chunk(rows, chunk, chunks, weight_N, settings, values_4N, gradients)
    return values_4N, [
        g if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, sources, strict=True)
    ]


def _fixed_weights(rows: Rows, settings: LossSettings) -> Tensor:
    """What of each row's weight is known before its confidence, [N]."""
    weights_G = position_weights(settings, rows.gamma).to(rows.grid_N.device)
    if settings.weighting == "dpace":
        weights_G = torch.ones_like(weights_G)
    weight_N = weights_G[rows.grid_N % rows.gamma]
    return weight_N if rows.scale_N is None else weight_N * rows.scale_N


def _one_chunk(
    rows: Rows,
    chunk: Chunk,
    chunks: Chunks,
    weight_N: Tensor,
    settings: LossSettings,
    values_4N: Tensor,
    gradients: list[Tensor | None],
) -> None:
    """Write a chunk's values and gradients; its logits end with this call."""
    wanted = any(g is not None for g in gradients)
    place = chunk.rows
    draft, derivative = _draft_logits(rows, place)
    compared = bool(rows.target_hidden_NH.shape[1])
    states_U = chunks.first_U[chunk.states]
    target = rows.target_head.logits(rows.target_hidden_NH[states_U]) if compared else draft[:0]
    if compared and native_fits(draft.shape[1], draft, target):
        state_n, weight_n = chunks.state_N[place], weight_N[place]
        values_4N[:, place] = _native_chunk(rows, place, draft, target, state_n, weight_n, settings, wanted)
    else:
        for part in chunk.slices:
            own = slice(part.start - place.start, part.stop - place.start)
            about = rows.tokens_N[part, None], rows.grid_N[part], weight_N[part], rows.gamma
            logits_nV = draft[own].to(values_4N.dtype)
            if compared:
                target_nV = target[chunks.state_N[part]].to(values_4N.dtype)
                values_4N[:, part], gradient = for_device(terms_and_gradient, draft.device)(
                    logits_nV, target_nV, *about, rows.draft_ids_W, settings, wanted
                )
            else:
                values_4N[:, part], gradient = ce_and_gradient(logits_nV, *about, settings)
            if gradient is not None:
                draft[own] = gradient
    if wanted:
        _push_back(rows, place, draft, derivative, gradients)


def _draft_logits(rows: Rows, chunk: slice) -> tuple[Tensor, Tensor | None]:
    """z of a chunk [n, V], and the soft cap's derivative d head(h) / d (scale W h) where there is a cap."""
    base, derivative = rows.head.logits(rows.hidden_NH[chunk]), None
    if rows.head.soft_cap:
        derivative = 1 - (base / rows.head.soft_cap).square_()
    if rows.markov is not None:
        m_Nr, w2_Vr = rows.markov
        base.addmm_(m_Nr[chunk], w2_Vr.to(m_Nr.dtype).T)
    return base, derivative


def _native_chunk(
    rows: Rows,
    chunk: slice,
    draft_nV: Tensor,
    target_uV: Tensor,
    state_n: Tensor,
    weight_n: Tensor,
    settings: LossSettings,
    wanted: bool,
) -> Tensor:
    """`terms_and_gradient` of a whole chunk by C++ functions: the values, and the gradient in place of the
    draft logits."""
    token_n, reduced = rows.tokens_N[chunk], rows.draft_ids_W is not None
    inside_uV = target_uV[:, rows.draft_ids_W] if reduced else target_uV
    found = RowDistances(draft_nV, inside_uV, state_n, token_n, target_uV if reduced else None)
    by_ce, by_tv, by_kl = term_weights(found.ce, found.tv, rows.grid_N[chunk], weight_n, rows.gamma, settings)
    known_n = token_n >= 0
    shares = by_ce * known_n, by_tv, by_kl
    if wanted:
        found.overwrite_with_gradient(*shares)
    kl = found.kl if settings.kl > 0 or settings.lk > 0 else torch.zeros_like(found.kl)
    return row_values(shares, found.ce.where(known_n, 0.0), found.tv, kl)


def _push_back(
    rows: Rows,
    chunk: slice,
    gradient_nV: Tensor,
    derivative_nV: Tensor | None,
    gradients: list[Tensor | None],
) -> None:
    """Write a chunk's gradients by hidden and m, and add up those by W_2."""
    of_hidden, of_m, of_w2 = gradients
    if rows.markov is not None:
        m_Nr, w2_Vr = rows.markov
        if of_m is not None:
            of_m[chunk] = gradient_nV @ w2_Vr.to(gradient_nV.dtype)
        if of_w2 is not None and of_w2.dtype == gradient_nV.dtype:
            of_w2.addmm_(gradient_nV.T, m_Nr[chunk])
        elif of_w2 is not None:
            of_w2 += gradient_nV.T @ m_Nr[chunk]
    if of_hidden is not None:
        if derivative_nV is not None:
            gradient_nV.mul_(derivative_nV)
        of_hidden[chunk] = (gradient_nV @ rows.head.weight_VH.to(gradient_nV.dtype)).mul_(rows.head.scale)

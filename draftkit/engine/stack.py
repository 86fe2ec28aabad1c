"""A stack of transformer layers over flattened tokens and paged keys and values: the target's, or the
drafter's.

Written with few operations, because on a CPU (and for one request on a GPU) their number decides the speed:
fused qkv and gate/up matrices, residuals added inside the matrix products, one rotary multiplication for
queries and keys together.

Shapes: T tokens, H hidden, N query heads, M key/value heads, D head size, I intermediate, P slots of the KV
memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.engine.passes import PagedPass, Pass

TRITON = importlib.util.find_spec("triton") is not None  # not everywhere, and not needed on a CPU
if TRITON:
    from draftkit.ops import paged_attention

Indices = Pass | PagedPass


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and habits of one layer's attention. Scores are q . k * scale, then `score_cap` * tanh(scores /
    score_cap); with `value_norm` values are divided by their root mean square. `window` as in `Pass`."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    score_cap: float | None = None
    window: int | None = None
    value_norm: bool = False


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; matrices are [out, in]. Missing parts are None.

    x += post_attention_norm(attention(input_norm(x))); x += mlp_out_norm(mlp(mlp_norm(x))); x *=
    output_scale.
    """

    attention: AttentionShape
    rotary: Tensor  # complex [positions, 1, D / 2], see `rotary_table`
    input_norm: Tensor  # [H]
    qkv: Tensor  # [(N + 2 M) D, H], rows of q and k in pair order (see `pair_rows`)
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [N + M, D], in pair order
    out: Tensor  # [H, N D]
    out_bias: Tensor | None
    post_attention_norm: Tensor | None  # [H]
    mlp_norm: Tensor  # [H]
    gate_up: Tensor  # [2 I, H]
    down: Tensor  # [H, I]
    mlp_out_norm: Tensor | None  # [H]
    output_scale: float = 1.0


@dataclass(frozen=True)
class StackShape:
    """What all layers share: hidden size, `eps` of the norms, and whether the MLP's gate is a tanh GELU or
    SiLU."""

    hidden: int
    eps: float
    gelu: bool = False


def pair_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head from halves (0..D/2, D/2..D) to neighbours (0, D/2, 1, D/2 + 1, ...).

    A rotation then acts on neighbouring numbers, one complex multiplication. Scores q . k do not change,
    because queries and keys are reordered alike. Works on [heads * D, ...] and on [D].
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape).contiguous()


def rotary_table(positions: int, inverse_frequencies: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """exp(i position frequency), complex [positions, 1, D / 2]; angles in float32 as Transformers has
    them."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies.float().cpu()
    parts = torch.stack([angles.cos(), angles.sin()], -1) * scaling
    return torch.view_as_complex(parts.to(torch.float64 if dtype == torch.float64 else torch.float32))[
        :, None
    ]


class Stack:
    """The layers, their part of the KV memory, and the forward pass in PyTorch operations."""

    def __init__(self, shape: StackShape, layers: Sequence[Layer], slots: int) -> None:
        # slot number `slots` takes what padding writes
        self.shape, self.layers, self.slots = shape, layers, slots
        # zeros, not empty: what no request has written is masked, and a mask does not hide a NaN
        sizes = [(layer.attention.kv_heads, 2 * layer.attention.head_dim) for layer in layers]
        self.memory = tuple(_zeros((slots + 1, *s), layers[0].qkv) for s in sizes)  # [P + 1, M, 2 D] each
        self.paged = layers[0].qkv.is_cuda and self._kernels_fit()

    def drop_weights(self) -> None:
        """Give the layers back: from now on a compiled pass, which has its own copy of them, fills the
        memory."""
        self.layers = ()

    def laid(self, step: Pass) -> Indices:
        """The pass as this stack reads it: for kernels of a GPU where they can run."""
        return PagedPass.of(step) if self.paged else step

    def _kernels_fit(self) -> bool:
        if not TRITON or self.layers[0].qkv.dtype not in paged_attention.DTYPES:
            return False
        return all(layer.attention.head_dim in paged_attention.HEAD_DIMS for layer in self.layers)

    def run(self, x_TH: Tensor, step: Indices, capture: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the last layer, before the final norm, [T, H], and the outputs of the layers
        `capture`."""
        turned: dict[int, Tensor] = {}
        captured: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            qkv = F.linear(self._norm(x_TH, layer.input_norm, step), layer.qkv, layer.qkv_bias)
            x_TH = self.finish_layer(index, x_TH, qkv, turned, step)
            if index in capture:
                captured.append(x_TH)
        return x_TH, captured

    def finish_layer(
        self, index: int, x_TH: Tensor, qkv: Tensor, turned: dict[int, Tensor], step: Indices
    ) -> Tensor:
        """A layer after its first projection: residual stream [T, H] and queries, keys, values [T, (N + 2 M)
        D] to [T, H].

        `turned` keeps the rows of rotary tables at the pass's positions: one lookup for all layers that share
        a table.
        """
        layer, eps = self.layers[index], self.shape.eps
        mixed = (
            self._attend_paged(index, qkv, step)
            if isinstance(step, PagedPass)
            else self._attend(index, qkv, turned, step)
        )
        x_TH = _add(x_TH, mixed, layer.out, layer.out_bias, layer.post_attention_norm, eps)
        inner = self._gated(F.linear(self._norm(x_TH, layer.mlp_norm, step), layer.gate_up), step)
        x_TH = _add(x_TH, inner, layer.down, None, layer.mlp_out_norm, eps)
        return x_TH if layer.output_scale == 1 else x_TH * layer.output_scale

    def write(self, step: Indices, keys: Tensor, values: Tensor) -> None:
        """Put projected keys (not yet rotated, pair order) and values [L, T, M, D] at the pass's slots, all
        layers.

        The layers must share one rotary table.
        """
        rotated = rotate(keys, self.layers[0].rotary[step.positions])
        for memory, both in zip(self.memory, torch.cat([rotated, values], -1), strict=True):
            memory[step.slots] = both

    def _norm(self, x_TH: Tensor, weight: Tensor, step: Indices) -> Tensor:
        """RMSNorm of the rows, [T, H]."""
        if isinstance(step, PagedPass):
            return paged_attention.rms_norm(x_TH, weight, self.shape.eps)
        return rms_norm(x_TH, weight, self.shape.eps)

    def _gated(self, gate_up: Tensor, step: Indices) -> Tensor:
        """The MLP's inner row: [T, 2 I] to [T, I]."""
        if isinstance(step, PagedPass):
            return paged_attention.gated(gate_up, self.shape.gelu)
        gate, up = gate_up.chunk(2, -1)
        return (F.gelu(gate, approximate="tanh") if self.shape.gelu else F.silu(gate)).mul_(up)

    def _attend_paged(self, index: int, qkv: Tensor, step: PagedPass) -> Tensor:
        """`_attend` in kernels."""
        layer, memory, shape = self.layers[index], self.memory[index], self.layers[index].attention
        queries = paged_attention.store(
            qkv,
            layer.qk_norm,
            layer.rotary,
            step.positions,
            step.slots,
            memory,
            shape.heads,
            self.shape.eps,
            shape.value_norm,
        )
        return paged_attention.attend(queries, memory, step, shape.scale, shape.score_cap, shape.window)

    def _attend(self, index: int, qkv: Tensor, turned: dict[int, Tensor], step: Pass) -> Tensor:
        """Rotate, store, attend: [T, (N + 2 M) D] to [T, N D]."""
        layer, memory, shape = self.layers[index], self.memory[index], self.layers[index].attention
        if id(layer.rotary) not in turned:
            turned[id(layer.rotary)] = layer.rotary[step.positions]
        count, size = shape.heads + shape.kv_heads, (shape.head_dim,)
        qkv = qkv.view(len(step), -1, shape.head_dim)
        qk, v = qkv[:, :count], qkv[:, count:]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, size, None, self.shape.eps).mul_(layer.qk_norm)
        if shape.value_norm:
            v = F.rms_norm(v, size, None, self.shape.eps)
        qk = rotate(qk, turned[id(layer.rotary)])
        memory[step.slots] = torch.cat([qk[:, shape.heads :], v], -1)
        q = qk[:, : shape.heads]
        pages = memory[: self.slots].view(-1, step.block_size, *memory.shape[1:])
        rows = zip(step.firsts_R.tolist(), step.ends_R.tolist(), strict=True)
        return torch.cat([_attend_request(shape, pages, q[a:b], step, r) for r, (a, b) in enumerate(rows)])


def _attend_request(shape: AttentionShape, pages: Tensor, q_tND: Tensor, step: Pass, request: int) -> Tensor:
    """A request's queries against its gathered pages, [t, N D]; query heads of a key head are queries."""
    fold = shape.heads // shape.kv_heads
    folded = q_tND.unflatten(1, (shape.kv_heads, fold)).permute(1, 2, 0, 3)  # [M, N/M, t, D]
    q = folded.flatten(1, 2)[None]
    k, v = pages[step.blocks(request)].flatten(0, 1).transpose(0, 1)[None].chunk(2, -1)  # [1, M, S, D] each
    mask = step.mask(request, shape.window).repeat(fold, 1)
    if shape.score_cap is None:
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=shape.scale)
    else:
        scores = torch.tanh(q @ k.transpose(-1, -2) * (shape.scale / shape.score_cap)) * shape.score_cap
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1, dtype=wide).to(q.dtype) @ v
    return out[0].unflatten(1, (fold, -1)).permute(2, 0, 1, 3).flatten(1)


def _zeros(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros; on a CPU they take memory only where they have been written, while `torch.zeros` writes all."""
    if like.device.type != "cpu":
        return like.new_zeros(size)
    *rows, numbers = size
    return torch.from_numpy(np.zeros((*rows, numbers * like.element_size()), np.uint8)).view(like.dtype)


def _add(
    x: Tensor, y: Tensor, matrix: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float
) -> Tensor:
    """x + norm(y matrix^T + bias), without a norm in one operation."""
    if norm is not None:
        return x + rms_norm(F.linear(y, matrix, bias), norm, eps)
    return torch.addmm(x if bias is None else x + bias, y, matrix.t())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; weights of a wider dtype than x are applied before
    rounding."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs, in float32 at least: [..., heads, D] with [T, 1, D / 2]
    complex."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    paired = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(paired * rotary).flatten(-2).to(x.dtype)

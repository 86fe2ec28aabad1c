"""A stack of transformer layers over flattened tokens and paged keys and values: the target's, or the drafter's.

Written with few operations, because on a CPU (and for one request on a GPU) their number decides the speed: fused qkv and
gate/up matrices, residuals added inside the matrix products, one rotary multiplication for queries and keys together.

Shapes: T tokens, H hidden, N query heads, M key/value heads, D head size, I intermediate, P slots of the KV memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.engine.passes import Group, Pass


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; matrices are [out, in], biases and the norms of queries and keys may be missing."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(N + 2 M) D, H], rows of q and k in pair order (see `pair_rows`)
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [N + M, D], in pair order
    out: Tensor  # [H, N D]
    out_bias: Tensor | None
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [2 I, H]
    down: Tensor  # [H, I]


@dataclass(frozen=True)
class StackShape:
    """Sizes that all layers share; `eps` of the norms."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float


def pair_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head from halves (0..D/2, D/2..D) to neighbours (0, D/2, 1, D/2 + 1, ...).

    A rotation then acts on neighbouring numbers, one complex multiplication. Scores q . k do not change, because queries
    and keys are reordered alike. Works on [heads * D, ...] and on [D].
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape).contiguous()


def rotary_table(positions: int, inverse_frequencies: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """exp(i position frequency), complex [positions, 1, D / 2]; angles in float32 as Transformers has them."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies.float().cpu()
    parts = torch.stack([angles.cos(), angles.sin()], -1) * scaling
    return torch.view_as_complex(parts.to(torch.float64 if dtype == torch.float64 else torch.float32))[:, None]


class Stack:
    """The layers, their part of the KV memory, and the forward pass in PyTorch operations."""

    def __init__(self, shape: StackShape, layers: tuple[Layer, ...], rotary: Tensor, slots: int) -> None:
        self.shape, self.layers, self.rotary = shape, layers, rotary
        weight = layers[0].qkv
        # zeros, not empty: what no request has written is masked, and a mask does not hide a NaN
        self.memory = weight.new_zeros(len(layers), slots, shape.kv_heads, 2 * shape.head_dim)  # [L, P, M, 2 D]

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one position in all layers."""
        return self.memory[:, :1].nbytes

    def run(self, x_TH: Tensor, step: Pass, capture: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the last layer, before the final norm, [T, H], and the outputs of the layers `capture`."""
        shape, size = self.shape, (self.shape.hidden,)
        rotary = self.rotary[step.positions]
        captured: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            qkv = F.linear(F.rms_norm(x_TH, size, layer.input_norm, shape.eps), layer.qkv, layer.qkv_bias)
            mixed = self._attend(index, qkv.view(len(step), -1, shape.head_dim), rotary, step)
            if layer.out_bias is not None:
                x_TH = x_TH + layer.out_bias
            x_TH = torch.addmm(x_TH, mixed, layer.out.t())
            both = F.linear(F.rms_norm(x_TH, size, layer.post_norm, shape.eps), layer.gate_up)
            gate, up = both.chunk(2, -1)
            x_TH = torch.addmm(x_TH, F.silu(gate).mul_(up), layer.down.t())
            if index in capture:
                captured.append(x_TH)
        return x_TH, captured

    def write(self, step: Pass, keys: Tensor, values: Tensor) -> None:
        """Put projected keys (not yet rotated, pair order) and values [L, T, M, D] at the pass's slots, all layers."""
        rotated = rotate(keys, self.rotary[step.positions])
        self.memory[:, step.slots] = torch.cat([rotated, values], -1)

    def _attend(self, index: int, qkv: Tensor, rotary: Tensor, step: Pass) -> Tensor:
        """Rotate, store, attend: [T, N + 2 M, D] to [T, N D]."""
        shape, norm = self.shape, self.layers[index].qk_norm
        count = shape.heads + shape.kv_heads
        qk, v = qkv[:, :count], qkv[:, count:]
        if norm is not None:
            qk = F.rms_norm(qk, (shape.head_dim,), None, shape.eps).mul_(norm)
        qk = rotate(qk, rotary)
        memory = self.memory[index]
        memory[step.slots] = torch.cat([qk[:, shape.heads :], v], -1)
        parts = [self._attend_group(memory, qk[:, : shape.heads], group, step.block_size) for group in step.groups]
        if len(parts) == 1:
            return parts[0]
        mixed = parts[0].new_empty(len(step), parts[0].shape[1])
        for group, part in zip(step.groups, parts, strict=True):
            mixed[group.tokens] = part
        return mixed

    def _attend_group(self, memory: Tensor, q_TND: Tensor, group: Group, block_size: int) -> Tensor:
        """One rectangle of queries [R, Q] against gathered pages; query heads of one key head are further queries."""
        shape, requests = self.shape, group.requests
        q = q_TND[group.pad_RQ] if group.pad_RQ is not None else q_TND.unflatten(0, (requests, -1))
        fold = shape.heads // shape.kv_heads
        q = q.unflatten(2, (shape.kv_heads, fold)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [R, M, N/M * Q, D]
        pages = memory.view(-1, block_size * shape.kv_heads * 2 * shape.head_dim).index_select(0, group.blocks_RB)
        kv = pages.view(requests, -1, shape.kv_heads, 2 * shape.head_dim).transpose(1, 2)
        mask = group.mask.expand(-1, fold, -1, -1).flatten(1, 2)[:, None] if fold > 1 else group.mask
        out = F.scaled_dot_product_attention(q, kv[..., : shape.head_dim], kv[..., shape.head_dim :], mask)
        out = out.unflatten(2, (fold, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)  # [R Q, N D]
        return out[group.unpad_t] if group.unpad_t is not None else out


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs, in float32 at least: [..., heads, D] with [T, 1, D / 2] complex."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    paired = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(paired * rotary).flatten(-2).to(x.dtype)

"""Attention of drafted blocks for training: every block sees a range of the context, and all of itself.

All documents' context tokens lie end to end (C keys, shared by the blocks), all blocks' positions too (Q = X * G queries).
Block x sees the keys start_x <= c < stop_x and its own G keys, in both directions. What a dense [Q, C + Q] mask would say
is never written down: on a CPU, and on a GPU without the shared memory that flex_attention's kernels need, groups of
neighbouring blocks meet the keys up to their last stop and nothing behind; elsewhere flex_attention skips empty tiles.

Shapes: X blocks, G positions per block, C context keys, N query heads, M key/value heads, D head size; within a group
x blocks, L keys, R = x * (N / M) * G rows that share a key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

GROUP_BLOCKS = 16  # blocks that meet the same keys at once: more is fewer operations, but more keys behind a stop
FLEX_SHARED_MEMORY = 106_496  # bytes that flex_attention's kernels ask for; RTX 30 and 40 have 101,376
FLEX_HEAD_DIM = 256


@dataclass(frozen=True)
class BlockGroup:
    """Neighbouring blocks [first, last) of one document and the keys [start, stop) that some of them see.

    `front` and `back` mark, bool [x, 1, ...], which of the first and of the last of these keys a block must not see.
    """

    first: int
    last: int
    start: int
    stop: int
    front: Tensor
    back: Tensor


@dataclass(frozen=True)
class BlockPlan:
    """Who sees what, worked out once per batch for all layers: groups, or a mask of tiles for flex_attention."""

    gamma: int
    groups: tuple[BlockGroup, ...]
    flex_mask: BlockMask | None


def plan_blocks(start_X: Tensor, stop_X: Tensor, document_X: Tensor, gamma: int, keys: int, head_dim: int) -> BlockPlan:
    """Plan the attention of X blocks of `gamma` positions over `keys` context keys.

    Block x sees [start_x, stop_x), int64; blocks of one document are neighbours and see no other document's keys.
    """
    if flex_fits(start_X.device, head_dim):
        return BlockPlan(gamma, (), flex_mask(start_X, stop_X, gamma, keys))
    return BlockPlan(gamma, _groups(start_X, stop_X, document_X), None)


def block_attention(
    q_QND: Tensor, own: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], plan: BlockPlan, scale: float
) -> Tensor:
    """softmax(scale q k) v of every query: [Q, N, D], from own keys and values [Q, M, D] and context ones [C, M, D].

    The softmax is at least float32.
    """
    if plan.flex_mask is not None:
        return flex_block_attention(q_QND, own, seen, plan.flex_mask, scale)
    out: Tensor = _GroupedAttention.apply(q_QND, *own, *seen, plan, scale)
    return out


# --- groups of blocks


def _groups(start_X: Tensor, stop_X: Tensor, document_X: Tensor) -> tuple[BlockGroup, ...]:
    starts, stops, documents = start_X.tolist(), stop_X.tolist(), document_X.tolist()
    groups, first = [], 0
    for i in range(1, len(starts) + 1):
        if i < len(starts) and documents[i] == documents[first] and i - first < GROUP_BLOCKS:
            continue
        part = slice(first, i)
        start, stop = min(starts[part]), max(stops[part])
        latest_start, earliest_stop = max(starts[part]), min(stops[part])
        front_keys = torch.arange(start, min(latest_start, stop), device=start_X.device)
        back_keys = torch.arange(max(earliest_stop, start), stop, device=start_X.device)
        front = front_keys < start_X[part, None, None]
        back = back_keys >= stop_X[part, None, None]
        groups.append(BlockGroup(first, i, start, stop, front, back))
        first = i
    return tuple(groups)


class _GroupedAttention(torch.autograd.Function):
    """Probabilities exist for one group at a time; backward computes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_QND: Tensor,
        own_k_QMD: Tensor,
        own_v_QMD: Tensor,
        seen_k_CMD: Tensor,
        seen_v_CMD: Tensor,
        plan: BlockPlan,
        scale: float,
    ) -> Tensor:
        out_QND = torch.empty_like(q_QND)
        for group in plan.groups:
            part = _Part(group, plan.gamma, q_QND, own_k_QMD, own_v_QMD, seen_k_CMD, seen_v_CMD)
            probs = part.probabilities(scale)
            mixed = probs[..., : part.length] @ part.seen_v
            part.scatter(mixed.add_(part.by_block(probs[..., part.length :], part.own_v)), out_QND)
        ctx.save_for_backward(q_QND, own_k_QMD, own_v_QMD, seen_k_CMD, seen_v_CMD, out_QND)
        ctx.plan, ctx.scale = plan, scale
        return out_QND

    @staticmethod
    def backward(ctx: Any, grad_QND: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out_QND = ctx.saved_tensors
        wide = torch.promote_types(out_QND.dtype, torch.float32)  # several groups add up in the context's gradients
        by_q, by_own_k, by_own_v = (torch.empty_like(t) for t in inputs[:3])
        by_seen_k, by_seen_v = (torch.zeros_like(t, dtype=wide) for t in inputs[3:])
        for group in ctx.plan.groups:
            part = _Part(group, ctx.plan.gamma, *inputs)
            length, probs = part.length, part.probabilities(ctx.scale)
            grad = part.gather(grad_QND)
            inner = (grad * part.gather(out_QND)).sum(-1, keepdim=True)
            by_probs = torch.cat([grad @ part.seen_v.mT, part.by_block(grad, part.own_v.mT)], -1)
            by_scores = by_probs.sub_(inner).mul_(probs).mul_(ctx.scale)
            by_part_q = by_scores[..., :length] @ part.seen_k
            part.scatter(by_part_q.add_(part.by_block(by_scores[..., length:], part.own_k)), by_q)
            keys = slice(group.start, group.stop)
            by_seen_k[keys] += (by_scores[..., :length].mT @ part.q).transpose(0, 1)
            by_seen_v[keys] += (probs[..., :length].mT @ grad).transpose(0, 1)
            part.scatter_own(by_scores[..., length:], part.q, by_own_k)
            part.scatter_own(probs[..., length:], grad, by_own_v)
        by_seen = (t.to(out_QND.dtype) for t in (by_seen_k, by_seen_v))
        return by_q, by_own_k, by_own_v, *by_seen, None, None


class _Part:
    """One group's share of the tensors. Rows are ordered (block, query head of the key/value head, position)."""

    def __init__(
        self, group: BlockGroup, gamma: int, q: Tensor, own_k: Tensor, own_v: Tensor, seen_k: Tensor, seen_v: Tensor
    ) -> None:
        self.group, self.gamma, self.kv_heads = group, gamma, own_k.shape[1]
        self.queries = slice(group.first * gamma, group.last * gamma)
        self.blocks, self.length = group.last - group.first, group.stop - group.start
        self.q = self.gather(q)
        keys = slice(group.start, group.stop)
        self.seen_k, self.seen_v = seen_k[keys].transpose(0, 1), seen_v[keys].transpose(0, 1)  # [M, L, D]
        self.own_k, self.own_v = (
            t[self.queries].unflatten(0, (-1, gamma)).permute(2, 0, 1, 3) for t in (own_k, own_v)  # [M, x, G, D]
        )

    def gather(self, x_QND: Tensor) -> Tensor:
        """The group's queries as [M, R, D]."""
        grid = x_QND[self.queries].unflatten(1, (self.kv_heads, -1)).unflatten(0, (-1, self.gamma))
        return grid.permute(2, 0, 3, 1, 4).flatten(1, 3)

    def scatter(self, x_MRD: Tensor, out_QND: Tensor) -> None:
        """Write [M, R, D] back to the group's queries."""
        grid = x_MRD.unflatten(1, (self.blocks, -1, self.gamma)).permute(1, 3, 0, 2, 4)
        out_QND[self.queries] = grid.flatten(2, 3).flatten(0, 1)

    def by_block(self, x_MRK: Tensor, y_Mx: Tensor) -> Tensor:
        """The product of each block's rows with that block's own matrix [M, x, K, E]: [M, R, E]."""
        return (x_MRK.unflatten(1, (self.blocks, -1)) @ y_Mx).flatten(1, 2)

    def scatter_own(self, x_MRG: Tensor, y_MRD: Tensor, out_QMD: Tensor) -> None:
        """Write each block's x^T y, one row for each of its own keys."""
        x, y = (t.unflatten(1, (self.blocks, -1)) for t in (x_MRG, y_MRD))
        out_QMD[self.queries] = (x.mT @ y).permute(1, 2, 0, 3).flatten(0, 1)

    def probabilities(self, scale: float) -> Tensor:
        """Context and own probabilities side by side, [M, R, L + G]."""
        to_context = self.q @ self.seen_k.mT
        grid = to_context.unflatten(1, (self.blocks, -1))
        front, back = self.group.front, self.group.back
        if front.shape[-1]:
            grid[..., : front.shape[-1]].masked_fill_(front, float("-inf"))
        if back.shape[-1]:
            grid[..., -back.shape[-1] :].masked_fill_(back, float("-inf"))
        scores = torch.cat([to_context, self.by_block(self.q, self.own_k.mT)], -1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(scores.to(wide).mul_(scale), -1).to(scores.dtype)


# --- flex_attention


def flex_fits(device: torch.device, head_dim: int) -> bool:
    """Whether flex_attention's kernels run on this device."""
    if device.type != "cuda" or head_dim > FLEX_HEAD_DIM:
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) >= FLEX_SHARED_MEMORY


def flex_mask(start_X: Tensor, stop_X: Tensor, gamma: int, keys: int) -> BlockMask:
    """The mask of tiles over [context keys ; own keys]."""
    queries = len(start_X) * gamma

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // gamma
        in_context = (key >= start_X[block]) & (key < stop_X[block])
        return in_context | ((key >= keys) & ((key - keys) // gamma == block))

    make = torch.compile(create_block_mask) if start_X.device.type == "cuda" else create_block_mask  # eager: [Q, C + Q]
    mask: BlockMask = make(sees, None, None, queries, keys + queries, device=start_X.device)
    return mask


def flex_block_attention(
    q_QND: Tensor, own: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], mask: BlockMask, scale: float
) -> Tensor:
    """`block_attention` by flex_attention, compiled where there is a kernel to compile to."""
    k, v = (torch.cat([s, o]).transpose(0, 1)[None] for s, o in zip(seen, own, strict=True))
    run = _compiled_flex() if q_QND.device.type == "cuda" else flex_attention
    mixed: Tensor = run(
        q_QND.transpose(0, 1)[None], k, v, block_mask=mask, scale=scale, enable_gqa=q_QND.shape[1] != own[0].shape[1]
    )
    return mixed[0].transpose(0, 1)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)

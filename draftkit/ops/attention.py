"""Attention of drafted blocks for training: every block sees a range of the context, and all of itself.

All documents' context tokens lie end to end (C keys, shared by the blocks), all blocks' positions too (Q = X
* G queries). Block x sees the keys start_x <= c < stop_x and its O own keys, in both directions: O is G, or
what the caller says (an unrolled drafter has the keys of its earlier steps). It must see one key at least.
What a dense [Q, C + P] mask would say is never written down: on a CPU, and on a GPU without the shared memory
that flex_attention's kernels need, groups of neighbouring blocks meet the keys up to their last stop and
nothing after; elsewhere flex_attention skips empty tiles. On a CPU with a compiler a C++ function goes
through the blocks instead (`ops/native_training.py`).

Shapes: X blocks, G positions per block, O own keys per block, P = X * O, C context keys, N query heads, M
key/value heads, D head size; within a group x blocks, L keys, R = x * G * N / M rows that share a key/value
head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from draftkit.ops.native_training import NativeBlockAttention, Ranges, native_fits

# blocks that meet the same keys at once: more is fewer operations, but more scores for nothing
GROUP_BLOCKS = 8
FLEX_SHARED_MEMORY = 106_496  # bytes that flex_attention's kernels ask for; RTX 30 and 40 have 101,376
FLEX_HEAD_DIM = 256


@dataclass(frozen=True)
class BlockGroup:
    """Neighbouring blocks of one document and the keys [start, stop) that some of them see, with their own
    after them.

    `front` and `back` mark, bool [x, 1, ...], which of the first and of the last of all these keys a block
    must not see.
    """

    queries: slice
    own: slice
    start: int
    stop: int
    front: Tensor
    back: Tensor


@dataclass(frozen=True)
class BlockPlan:
    """Who sees what, worked out once per batch for all layers: ranges of keys for the C++ function, the
    groups made of them for PyTorch operations, or a mask of tiles for flex_attention."""

    ranges: Ranges | None
    flex_mask: BlockMask | None

    @cached_property
    def groups(self) -> tuple[BlockGroup, ...]:
        """The blocks in groups; none where flex_attention has its mask."""
        return _groups(self.ranges) if self.ranges is not None else ()


def plan_blocks(
    start_X: Tensor,
    stop_X: Tensor,
    document_X: Tensor,
    gamma: int,
    keys: int,
    head_dim: int,
    own: int | None = None,
) -> BlockPlan:
    """Plan the attention of X blocks of `gamma` positions over `keys` context keys and `own` keys per block
    (null: gamma).

    Block x sees [start_x, stop_x), int64; blocks of one document are neighbours and see no other document's
    keys.
    """
    own = gamma if own is None else own
    if flex_fits(start_X.device, head_dim):
        return BlockPlan(None, flex_mask(start_X, stop_X, gamma, keys, own))
    _, counts = document_X.unique_consecutive(return_counts=True)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return BlockPlan(Ranges(start_X.contiguous(), stop_X.contiguous(), first, gamma, own), None)


def block_attention(
    q_QND: Tensor, own: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], plan: BlockPlan, scale: float
) -> Tensor:
    """softmax(scale q k) v of every query: [Q, N, D], from own keys and values [P, M, D] and context ones [C,
    M, D].

    The softmax is at least float32.
    """
    if plan.flex_mask is not None:
        return flex_block_attention(q_QND, own, seen, plan.flex_mask, scale)
    if plan.ranges is not None and native_fits(q_QND.shape[-1], q_QND, *own, *seen):
        native: Tensor = NativeBlockAttention.apply(q_QND, *own, *seen, plan.ranges, scale)
        return native
    out: Tensor = _GroupedAttention.apply(q_QND, *own, *seen, plan, scale)
    return out


# --- groups of blocks


def _groups(ranges: Ranges) -> tuple[BlockGroup, ...]:
    starts, stops, edges = ranges.start.tolist(), ranges.stop.tolist(), ranges.first.tolist()
    parts = (
        slice(i, min(i + GROUP_BLOCKS, b)) for a, b in pairwise(edges) for i in range(a, b, GROUP_BLOCKS)
    )
    return tuple(_group(ranges, part, starts, stops) for part in parts)


def _group(ranges: Ranges, part: slice, starts: list[int], stops: list[int]) -> BlockGroup:
    device, gamma, own = ranges.start.device, ranges.gamma, ranges.own
    start, stop = min(starts[part]), max(stops[part])
    front_keys = torch.arange(start, min(max(starts[part]), stop), device=device)
    back_keys = torch.arange(max(min(stops[part]), start), stop, device=device)
    others = ~torch.eye(part.stop - part.start, dtype=torch.bool, device=device).repeat_interleave(own, 1)
    front = front_keys < ranges.start[part, None]
    back = torch.cat([back_keys >= ranges.stop[part, None], others], 1)
    queries, keys = (slice(part.start * n, part.stop * n) for n in (gamma, own))
    return BlockGroup(queries, keys, start, stop, front[:, None], back[:, None])


class _GroupedAttention(torch.autograd.Function):
    """Probabilities exist for one group at a time; backward computes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_QND: Tensor,
        own_k_PMD: Tensor,
        own_v_PMD: Tensor,
        seen_k_CMD: Tensor,
        seen_v_CMD: Tensor,
        plan: BlockPlan,
        scale: float,
    ) -> Tensor:
        out_QND = torch.empty_like(q_QND)
        for group in plan.groups:
            q, k = _gather(q_QND, group, own_k_PMD.shape[1]), _keys(own_k_PMD, seen_k_CMD, group)
            _scatter(_probabilities(q, k, group, scale) @ _keys(own_v_PMD, seen_v_CMD, group), out_QND, group)
        ctx.save_for_backward(q_QND, own_k_PMD, own_v_PMD, seen_k_CMD, seen_v_CMD, out_QND)
        ctx.plan, ctx.scale = plan, scale
        return out_QND

    @staticmethod
    def backward(ctx: Any, grad_QND: Tensor) -> tuple[Tensor | None, ...]:
        q_QND, own_k, own_v, seen_k, seen_v, out_QND = ctx.saved_tensors
        # several groups add up in the context's gradients
        wide = torch.promote_types(out_QND.dtype, torch.float32)
        by_q, by_own_k, by_own_v = (torch.empty_like(t) for t in (q_QND, own_k, own_v))
        by_seen_k, by_seen_v = (torch.zeros_like(t, dtype=wide) for t in (seen_k, seen_v))
        for group in ctx.plan.groups:
            q, grad, out = (_gather(t, group, own_k.shape[1]) for t in (q_QND, grad_QND, out_QND))
            k, v = _keys(own_k, seen_k, group), _keys(own_v, seen_v, group)
            probs = _probabilities(q, k, group, ctx.scale)
            inner = (grad * out).sum(-1, keepdim=True)
            by_scores = (grad @ v.mT).sub_(inner).mul_(probs).mul_(ctx.scale)
            _scatter(by_scores @ k, by_q, group)
            _add_keys(by_scores.mT @ q, by_own_k, by_seen_k, group)
            _add_keys(probs.mT @ grad, by_own_v, by_seen_v, group)
        return by_q, by_own_k, by_own_v, by_seen_k.to(q_QND.dtype), by_seen_v.to(q_QND.dtype), None, None


def _gather(x_QND: Tensor, group: BlockGroup, kv_heads: int) -> Tensor:
    """The group's queries by key/value head: [M, R, D], rows ordered (query, query head)."""
    return x_QND[group.queries].unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _scatter(x_MRD: Tensor, out_QND: Tensor, group: BlockGroup) -> None:
    """Write [M, R, D] back to the group's queries."""
    count = group.queries.stop - group.queries.start
    out_QND[group.queries] = x_MRD.unflatten(1, (count, -1)).transpose(0, 1).flatten(1, 2)


def _keys(own_PMD: Tensor, seen_CMD: Tensor, group: BlockGroup) -> Tensor:
    """The group's context keys (or values) with its own after them: [M, L, D]."""
    return torch.cat([seen_CMD[group.start : group.stop], own_PMD[group.own]]).transpose(0, 1)


def _add_keys(by_keys_MLD: Tensor, by_own_PMD: Tensor, by_seen_CMD: Tensor, group: BlockGroup) -> None:
    """Add to the context's gradients, write the group's own."""
    by_keys, length = by_keys_MLD.transpose(0, 1), group.stop - group.start
    by_seen_CMD[group.start : group.stop] += by_keys[:length]
    by_own_PMD[group.own] = by_keys[length:]


def _probabilities(q_MRD: Tensor, k_MLD: Tensor, group: BlockGroup, scale: float) -> Tensor:
    """[M, R, L]."""
    scores = q_MRD @ k_MLD.mT
    grid, front, back = scores.unflatten(1, (len(group.back), -1)), group.front, group.back
    grid[..., : front.shape[-1]].masked_fill_(front, float("-inf"))
    grid[..., grid.shape[-1] - back.shape[-1] :].masked_fill_(back, float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores.to(wide).mul_(scale), -1).to(scores.dtype)


# --- flex_attention


def flex_fits(device: torch.device, head_dim: int) -> bool:
    """Whether flex_attention's kernels run on this device."""
    if device.type != "cuda" or not 16 <= head_dim <= FLEX_HEAD_DIM:
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) >= FLEX_SHARED_MEMORY


def flex_mask(start_X: Tensor, stop_X: Tensor, gamma: int, keys: int, own: int) -> BlockMask:
    """The mask of tiles over [context keys ; own keys]."""
    queries = len(start_X) * gamma

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // gamma
        in_context = (key >= start_X[block]) & (key < stop_X[block])
        return in_context | ((key >= keys) & ((key - keys) // max(own, 1) == block))

    # as plain operations it goes through a whole [Q, C + Q]
    make = _for_device(create_block_mask, start_X.device)
    mask: BlockMask = make(sees, None, None, queries, keys + len(start_X) * own, device=start_X.device)
    return mask


def flex_block_attention(
    q_QND: Tensor, own: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], mask: BlockMask, scale: float
) -> Tensor:
    """`block_attention` by flex_attention, compiled where there is a kernel to compile to."""
    k, v = (torch.cat([s, o]).transpose(0, 1)[None] for s, o in zip(seen, own, strict=True))
    mixed: Tensor = _for_device(flex_attention, q_QND.device)(
        q_QND.transpose(0, 1)[None],
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_QND.shape[1] != own[0].shape[1],
        # its other kernel, for few queries, cannot be compiled for this
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return mixed[0].transpose(0, 1)


def _for_device(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    """Compiled once for all batches, whatever their lengths."""
    return torch.compile(function, dynamic=True)

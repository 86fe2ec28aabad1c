"""What a GPU runs between the matrix products of a layer, in Triton: attention over paged keys and values,
and what is there beside it (`rms_norm`, `gated`), each in one kernel, because for few tokens their number
decides.

Attention has two steps. `store` norms and rotates queries and keys of a flattened pass, and writes keys and
values to their slots; `attend` reads them back page by page. Neither depends on how many requests there are
or how long they are, so a pass of T tokens can be recorded once for all of them (see `engine/graphs.py`).

A tile is a few neighbouring tokens of one request: they look at the same keys, which are loaded once for
them. Where a pass has too few tiles to fill a GPU, the keys of a tile are split among several programs and
their results joined (flash-decoding). Everything is summed in float32.

Shapes: T tokens, N query heads, M key/value heads, D head size, P slots, S splits. Index tensors are int64.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
from torch import Tensor

from draftkit.ops.paged_kernels import attend_kernel, gate_kernel, join_kernel, norm_kernel, store_kernel

HEADS = 8  # of a token, rotated and stored by one program
KEYS, WIDE_KEYS = 64, 16  # looked at together; fewer in float32, whose products are long programs
COLUMNS = 1024  # of the MLP's inner row, by one program
PROGRAMS = 264  # enough to fill a GPU: two for each of 132 multiprocessors
MOST_SPLITS = 16
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tiles(Protocol):
    """Where the tokens of a pass look. Tile i holds `count[i]` tokens from flat row `first[i]`, at most
    `tile`, possibly none; they are of the request whose block ids begin at `tables[row[i] * width]`. Token t
    sees positions below `seen[t]`, in a layer with a window none before `origins[t]` - window. Index tensors
    [tiles] and [T]; `width` is [1]. Where tiles are few, `split` lets several programs look at the keys of
    one."""

    first: Tensor
    count: Tensor
    row: Tensor
    seen: Tensor
    origins: Tensor
    tables: Tensor
    width: Tensor
    tile: int
    split: bool
    block_size: int


def store(
    qkv: Tensor,
    qk_norm: Tensor | None,
    rotary: Tensor,
    positions: Tensor,
    slots: Tensor,
    memory: Tensor,
    heads: int,
    eps: float,
    value_norm: bool,
) -> Tensor:
    """Queries [T, N, D], normed and rotated; keys (likewise) and values go to `memory` [P, M, 2 D] at
    `slots`.

    `qkv` is [T, (N + 2 M) D] with queries and keys in pair order, `qk_norm` [N + M, D] or None, `rotary`
    complex [positions, 1, D / 2].
    """
    tokens, (_, kv_heads, both) = len(qkv), memory.shape
    queries = qkv.new_empty(tokens, heads, both // 2)
    table = torch.view_as_real(rotary)
    grid = (tokens, triton.cdiv(heads + 2 * kv_heads, HEADS))
    store_kernel[grid](
        qkv, qk_norm if qk_norm is not None else qkv, table, positions, slots, memory, queries, eps,
        N=heads, M=kv_heads, D=both // 2, NORM=qk_norm is not None,
        VALUE_NORM=value_norm, HEADS=HEADS, num_warps=4,
    )  # fmt: skip
    return queries


def attend(
    queries: Tensor, memory: Tensor, tiles: Tiles, scale: float, score_cap: float | None, window: int | None
) -> Tensor:
    """Attention of `queries` [T, N, D] over `memory` [P, M, 2 D]: [T, N D]. Scores as in `AttentionShape`."""
    tokens, heads, size = queries.shape
    kv_heads, count = memory.shape[1], len(tiles.first)
    fold = heads // kv_heads
    padded_fold = triton.next_power_of_2(fold)
    fit = max(1, min(MOST_SPLITS, PROGRAMS // (count * kv_heads)))
    splits = 1 << fit.bit_length() - 1 if tiles.split else 1  # few variants to compile
    out = torch.empty_like(queries)
    parts = queries.new_empty(splits, tokens, heads, size, dtype=torch.float32) if splits > 1 else out
    weights = queries.new_empty(splits, tokens, heads, dtype=torch.float32) if splits > 1 else out
    attend_kernel[(count, kv_heads, splits)](
        queries, memory, tiles.first, tiles.count, tiles.row, tiles.seen,
        tiles.origins, tiles.tables, tiles.width,
        parts, weights, tokens, scale, score_cap or 0.0, window or 0,
        N=heads, M=kv_heads, D=size, FOLD=fold, FOLD_2=padded_fold, ROWS=max(16, padded_fold * tiles.tile),
        KEYS=WIDE_KEYS if queries.dtype == torch.float32 else KEYS, BLOCK=tiles.block_size, SPLITS=splits,
        CAP=score_cap is not None, WINDOW=window is not None, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(tokens, heads)](parts, weights, out, tokens, N=heads, D=size, SPLITS=splits, num_warps=1)
    return out.view(tokens, heads * size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of [T, H], rounded once."""
    out = torch.empty_like(x)
    norm_kernel[(len(x),)](
        x, weight, out, eps, H=x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8
    )
    return out


def gated(gate_up: Tensor, gelu: bool) -> Tensor:
    """[T, 2 I], gate before up, to activation(gate) * up [T, I], with SiLU or tanh GELU."""
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    gate_kernel[(tokens, triton.cdiv(width, COLUMNS))](
        gate_up, out, I=width, GELU=gelu, BLOCK=COLUMNS, num_warps=4
    )
    return out

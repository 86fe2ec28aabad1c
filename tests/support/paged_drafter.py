"""A random block drafter, its paged form, and passes over it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import DrafterConfig, Proposal
from draftkit.engine.drawing import Drawing
from draftkit.engine.paged_drafter import PagedBlockDrafter
from draftkit.engine.passes import Pass
from draftkit.ops.sampling import Sampling, row_settings
from support.drafters import BLOCK_CONFIG

PAGE = 4
LENGTHS = (21, 3, 8)
TABLES = [[7, 2, 9, 11, 0, 5, 6, 20], [1, 3, 12], [8, 4, 10, 19]]  # pages lie anywhere


def build(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[BlockDrafter, PagedBlockDrafter]:
    torch.manual_seed(0)
    drafter = BlockDrafter(replace(BLOCK_CONFIG, **changes))
    if size := drafter.config.draft_vocab_size:
        drafter.choose_vocabulary(torch.arange(1, drafter.config.vocab_size, 2)[:size], None)
    for name, parameter in drafter.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    for name, buffer in drafter.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    drafter = drafter.to(dtype).eval()
    return drafter, PagedBlockDrafter(drafter, slots=24 * PAGE, max_length=40)


def one_pass(
    tokens: list[list[int]], starts: list[int], dtype: torch.dtype, rows: list[int], block: bool = False
) -> Pass:
    width = max(map(len, TABLES))
    return Pass(
        np.concatenate([np.array(t) for t in tokens]),
        np.array(starts),
        np.array([len(t) for t in tokens]),
        np.array([TABLES[r] + [0] * (width - len(TABLES[r])) for r in rows]),
        PAGE,
        torch.device("cpu"),
        dtype,
        block,
    )


def block_pass(anchors: list[int], starts: list[int], config: DrafterConfig, dtype: torch.dtype) -> Pass:
    masks = [config.mask_token_id] * (config.block_size - 1)
    return one_pass([[a, *masks] for a in anchors], starts, dtype, [0, 1, 2], block=True)


def alone(step: Pass, row: int) -> Pass:
    """One request of a pass of blocks."""
    size = int(step.lengths_R[row])
    return Pass(
        step.tokens_T[row * size : (row + 1) * size],
        step.starts_R[row : row + 1],
        step.lengths_R[row : row + 1],
        step.tables_RB[row : row + 1],
        step.block_size,
        step.device,
        step.dtype,
        block=True,
    )


def propose_together(
    fast: PagedBlockDrafter,
    features: list[Tensor],
    anchors: list[int],
    sampling: Sampling,
    uniforms_RG: Tensor,
) -> Proposal:
    """All requests at once; the contexts come in two passes, the second with rejected tokens after the
    committed."""
    dtype = fast.norm.dtype
    cuts = [5, 0, 2]
    for first, last in ((0, 1), (1, 2)):
        bounds = [(0, cut, n) for cut, n in zip(cuts, LENGTHS, strict=True)]
        rows = [r for r in range(3) if bounds[r][last] > bounds[r][first]]
        pieces = [features[r][bounds[r][first] : bounds[r][last] + (2 if last == 2 else 0)] for r in rows]
        step = one_pass([[0] * len(p) for p in pieces], [bounds[r][first] for r in rows], dtype, rows)
        fast.extend(step, torch.cat(pieces), torch.zeros(len(step), dtype=torch.int64))

    step = block_pass(anchors, list(LENGTHS), fast.config, dtype)
    drawing = Drawing(row_settings([sampling] * 3), uniforms_RG.numpy())
    tokens, drawn, confidence, largest = fast.draft(step, torch.tensor(anchors), drawing)
    probs = drawn.dense().unflatten(0, (3, -1)) if drawn is not None else torch.empty(*tokens.shape, 0)
    return Proposal(tokens, probs, confidence, largest)

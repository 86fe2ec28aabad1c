"""How the rows of a loss are cut: into chunks, whose logits exist together, of slices, which are worked on at
once. What the host has to know of rows on a device it learns here, in a few waits for any number of chunks.

Shapes: N rows, U distinct target states of all chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of whole blocks; `states` are its target states among those of all chunks."""

    slices: list[slice]
    states: slice

    @property
    def rows(self) -> slice:
        """All of its rows."""
        return slice(self.slices[0].start, self.slices[-1].stop)


@dataclass(frozen=True)
class Chunks:
    """`first_U` is a row for each target state, chunk after chunk; `state_N` the number of each row's state
    among those of its chunk: blocks overlap."""

    parts: list[Chunk]
    first_U: Tensor
    state_N: Tensor


def cut_rows(grid_N: Tensor, place_N: Tensor, gamma: int, chunk_rows: int, slice_rows: int) -> Chunks:
    """Cut rows in ascending order of `grid_N`, their places in a grid [blocks, gamma], into chunks and slices
    of at most so many rows that never cut a block; at least one block each. Rows of one number in `place_N`
    have one target state."""
    if not len(grid_N):
        return Chunks([], grid_N, grid_N)
    blocks = max(1, min(slice_rows, chunk_rows) // gamma)  # of a slice
    together = max(1, chunk_rows // gamma // blocks)  # slices of a chunk
    first, last = torch.stack([grid_N[0] // gamma * gamma, grid_N[-1]]).tolist()
    borders = torch.arange(first, last + blocks * gamma, blocks * gamma, device=grid_N.device)
    edges = [*torch.searchsorted(grid_N, borders).tolist(), len(grid_N)]
    cuts = [slice(a, b) for a, b in pairwise(edges)]
    groups = [[s for s in cuts[i : i + together] if s.start < s.stop] for i in range(0, len(cuts), together)]
    groups = [group for group in groups if group]
    sizes = torch.tensor([group[-1].stop - group[0].start for group in groups])
    chunk_N = torch.arange(len(groups)).repeat_interleave(sizes).to(grid_N.device)
    span = place_N.max() + 1
    state_U, state_N = (chunk_N * span + place_N).unique(return_inverse=True)
    first_U = torch.empty_like(state_U).scatter_(0, state_N, torch.arange(len(grid_N), device=grid_N.device))
    begin_C = torch.searchsorted(state_U, torch.arange(len(groups) + 1, device=grid_N.device) * span)
    states = [slice(a, b) for a, b in pairwise(begin_C.tolist())]
    parts = [Chunk(group, part) for group, part in zip(groups, states, strict=True)]
    return Chunks(parts, first_U, state_N - begin_C[chunk_N])

"""One flattened pass: the tokens of many requests in a row, with structure carried by indices.

Shapes: R requests, T tokens of all requests, t tokens of one, S positions of its blocks, B blocks per
request.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

LONG_QUERY = 32  # more new tokens of a request than this: a prompt is read
SHORT_TILE, LONG_TILE = 4, 16  # tokens that share what a kernel loads of their request's keys


class Pass:
    """Tokens to read, where their keys and values go, and what each may see.

    `tables_RB` are block ids per request (rows may be padded with anything valid), `lengths_R` new tokens per
    request, `starts_R` the position of the first. Token at position t of a request sees positions 0..t, or,
    with `block` (a drafter's bidirectional block), all positions up to the request's last one. In a layer
    with a window of w positions it sees no position before t - w + 1; a block sees w positions before its
    first.
    """

    def __init__(
        self,
        tokens_T: np.ndarray,
        starts_R: np.ndarray,
        lengths_R: np.ndarray,
        tables_RB: np.ndarray,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        block: bool = False,
    ) -> None:
        self.block_size, self.device, self.dtype, self.block = block_size, device, dtype, block
        self.tokens_T, self.starts_R, self.lengths_R = np.ascontiguousarray(tokens_T), starts_R, lengths_R
        last = int((starts_R + lengths_R).max())
        self.tables_RB = np.ascontiguousarray(tables_RB[:, : -(-last // block_size)])
        self._blocks: dict[int, Tensor] = {}  # by request
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def __len__(self) -> int:
        return len(self.tokens_T)

    # What follows from these is worked out when it is asked for; the C++ pass does it on its own (`Placed`).

    @cached_property
    def ends_R(self) -> np.ndarray:
        """After the last flat row of each request."""
        return self.lengths_R.cumsum()

    @cached_property
    def firsts_R(self) -> np.ndarray:
        """The first flat row of each request."""
        return self.ends_R - self.lengths_R

    @cached_property
    def row_T(self) -> np.ndarray:
        """The request of each token."""
        if len(self) == len(self.lengths_R):  # one each, as in most steps
            return np.arange(len(self))
        return np.repeat(np.arange(len(self.lengths_R)), self.lengths_R)

    @cached_property
    def positions_T(self) -> np.ndarray:
        """The position of each token in its request."""
        if len(self) == len(self.lengths_R):
            return self.starts_R
        return np.arange(len(self)) + (self.starts_R - self.firsts_R)[self.row_T]

    @cached_property
    def slots_T(self) -> np.ndarray:
        """Where each token's key and value go: block * block_size + offset."""
        blocks_T = self.tables_RB[self.row_T, self.positions_T // self.block_size]
        return blocks_T * self.block_size + self.positions_T % self.block_size

    @cached_property
    def seen_T(self) -> np.ndarray:
        """How many positions each token may look at."""
        return (self.starts_R + self.lengths_R)[self.row_T] if self.block else self.positions_T + 1

    @cached_property
    def origins_T(self) -> np.ndarray:
        """Where each token's window reaches back from."""
        return self.starts_R[self.row_T] if self.block else self.seen_T

    @cached_property
    def tokens(self) -> Tensor:
        """Token ids [T] on the device."""
        return self._on_device(self.tokens_T)

    @cached_property
    def positions(self) -> Tensor:
        """Absolute positions [T] on the device."""
        return self._on_device(self.positions_T)

    @cached_property
    def slots(self) -> Tensor:
        """Where keys and values go, [T] on the device."""
        return self._on_device(self.slots_T)

    def blocks(self, request: int) -> Tensor:
        """The blocks that hold what a request's tokens may see, int64 on the device."""
        if request not in self._blocks:
            end = int(self.starts_R[request] + self.lengths_R[request])
            self._blocks[request] = self._on_device(self.tables_RB[request, : -(-end // self.block_size)])
        return self._blocks[request]

    def mask(self, request: int, window: int | None) -> Tensor:
        """Which positions of its blocks each token of a request sees, bool [t, S] on the device; with a
        window only the last so many before the origin. Made once for all layers."""
        if (request, window) not in self._masks:
            rows = slice(self.firsts_R[request], self.ends_R[request])
            position_S = np.arange(len(self.blocks(request)) * self.block_size)
            seen_tS = position_S < self.seen_T[rows, None]
            if window is not None:
                seen_tS &= position_S >= self.origins_T[rows, None] - window
            self._masks[request, window] = self._on_device(seen_tS)
        return self._masks[request, window]

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class PagedPass:
    """A pass as the kernels of a GPU read it: all that changes from pass to pass in one row of int64 (see
    `flatten`), so that a recording can be given another pass by one copy."""

    def __init__(self, inputs: Tensor, tokens: int, tiles: int, tile: int, block_size: int) -> None:
        self.block_size, self._tokens = block_size, tokens
        ends = 5 * tokens, 5 * tokens + 3 * tiles
        self.tokens, self.positions, self.slots, self.seen, self.origins = inputs[: ends[0]].view(5, tokens)
        self.first, self.count, self.row = inputs[ends[0] : ends[1]].view(3, tiles)
        self.width, self.tables, self.tile = inputs[ends[1] : ends[1] + 1], inputs[ends[1] + 1 :], tile
        self.split = tile == SHORT_TILE  # prompts have tiles enough

    def __len__(self) -> int:
        return self._tokens

    @staticmethod
    def of(step: Pass) -> PagedPass:
        """On the pass's device, as long as it is."""
        tile = LONG_TILE if int(step.lengths_R.max()) > LONG_QUERY else SHORT_TILE
        tiles = int((-(-step.lengths_R // tile)).sum())
        inputs = torch.from_numpy(flatten(step, len(step), tiles, tile, 0)).to(step.device, non_blocking=True)
        return PagedPass(inputs, len(step), tiles, tile, step.block_size)


def flatten(step: Pass, tokens: int, tiles: int, tile: int, spare_slot: int) -> np.ndarray:
    """What `PagedPass` reads: tokens, positions, slots, seen, origins [tokens]; first row, count, request
    [tiles]; the width of the tables, and the tables.

    Padding looks at the first request's first position and writes to `spare_slot`. There must be room for it:
    a tile for each token is always enough.
    """
    given, padding = len(step), tokens - len(step)
    of_tokens = np.zeros((5, tokens), np.int64)
    of_tokens[:, :given] = step.tokens_T, step.positions_T, step.slots_T, step.seen_T, step.origins_T
    of_tokens[2, given:], of_tokens[3:, given:] = spare_slot, 1
    per_R = -(-step.lengths_R // tile)
    row = np.repeat(np.arange(len(per_R)), per_R)
    skipped = (np.arange(len(row)) - (per_R.cumsum() - per_R)[row]) * tile
    of_tiles = np.zeros((3, tiles), np.int64)
    of_tiles[:, : len(row)] = (
        step.firsts_R[row] + skipped,
        np.minimum(step.lengths_R[row] - skipped, tile),
        row,
    )
    spare = np.arange(0, padding, tile)
    of_tiles[:2, len(row) : len(row) + len(spare)] = given + spare, np.minimum(padding - spare, tile)
    return np.concatenate(
        [of_tokens.ravel(), of_tiles.ravel(), [step.tables_RB.shape[1]], step.tables_RB.ravel()]
    )

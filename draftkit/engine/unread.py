"""What the target has read and the drafter has not: while the drafter rests, its context is not written step by step.

The features of a step in which nobody drafts are kept, by the block that they belong to, until somebody is to draft from that
block. Then they are taken in together: a pass over one token costs the drafter nearly as much as one over hundreds. Most are
never asked for. What lies in blocks of finished answers is given up when LIMIT is reached, and with the block when its place is
needed for something else.

Where the drafter rests for long nearly all would be given up. So requests become deaf, those that read their prompt too: no
features are asked for, and their blocks are left unheard. The target may go on from such blocks, but a request that does is
deaf as well: its drafter's context has holes, and it does not draft.

Shapes: T tokens of a pass, F features, N tokens that are kept, U requests of all passes that are looked into, one behind the
other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.models import PagedDrafter
from draftkit.engine.passes import Pass
from draftkit.engine.running import Running

LIMIT = 8192  # tokens: of a target with 8 billion parameters 300 MB in bfloat16
LONG = 256  # tokens of a pass that is read at once: so many are no cheaper beside others
_TOGETHER = 256  # passes that are looked into at once: few by few they take longer, all of 8,192 keep others waiting
_GONE = -1  # the block of a token that is no longer wanted


# One pass: who read it, its features [T, F], the token behind each of its tokens, int64 [T], and the pool's clock then.
_Step = tuple[Sequence[Running], Pass, Tensor, np.ndarray, int]  # one is made in every step, and a class would take longer


class Unread:
    """Tokens that `drafter` has yet to read: their features, and a table with a column for each."""

    def __init__(self, drafter: PagedDrafter, pool: BlockPool) -> None:
        self._drafter, self._pool = drafter, pool
        self._features_NF = torch.empty(0, 0)
        self._kept_4N = np.empty((4, LIMIT + LONG), np.int64)  # block, position, next token, clock: see `_look_into`
        self._count = 0  # columns in use, those of tokens that are gone included
        self._steps: list[_Step] = []  # the last ones, not looked into yet
        self._waiting = 0  # tokens of these

    def add(self, requests: Sequence[Running], step: Pass, features_TF: Tensor, next_T: np.ndarray) -> None:
        """Keep a pass of these requests, with the token behind each of its tokens; nothing of it may be rejected."""
        self._steps.append((requests, step, features_TF, next_T, self._pool.clock))
        self._waiting += len(next_T)
        if self._count + self._waiting >= LIMIT:
            self._make_room()
        elif len(self._steps) >= _TOGETHER:
            self._look_into()

    def read(self, requests: Sequence[Running]) -> None:
        """The drafter reads, in one pass, all that it has not read of these requests, reused prefixes included."""
        self._look_into()
        behind = [request for request in requests if request.unread]
        if behind:
            self._read(self._find(block for request in behind for block in request.table.blocks))
        for request in behind:
            request.unread = False

    def leave(self, requests: Sequence[Running]) -> None:
        """What these requests are about to read is read without features, and more will follow: they are deaf from here on."""
        self._look_into()
        for request in requests:
            if request.table.heard:
                self._leave(request)

    def _leave(self, request: Running) -> None:
        blocks = request.table.blocks
        missed = blocks[request.computed // self._pool.block_size :]
        if request.unread:
            found_N = self._find(blocks)
            unread = self._blocks(found_N)
            if self._pool.shared(unread):  # somebody drafts from what is unread
                self._read(found_N)
            else:
                self._kept_4N[0, found_N] = _GONE
                missed = unread + missed
        self._pool.leave_unheard(missed)
        request.deaf, request.table.heard = True, False

    def _look_into(self) -> None:
        """Put away the last steps' features, and note of each token where it belongs, what follows it, and when it was read:
        what a block got after that (see `BlockPool.clock`) is not this."""
        if not self._steps:
            return
        requests_of, passes, features, following, clocks = zip(*self._steps, strict=True)
        starts_U = np.concatenate([p.starts_R for p in passes])
        lengths_U = np.concatenate([p.lengths_R for p in passes])
        counts = [len(p.starts_R) for p in passes]
        widths_U = np.repeat([p.tables_RB.shape[1] for p in passes], counts)
        clocks_U = np.repeat(clocks, counts)
        tables = np.concatenate([p.tables_RB.ravel() for p in passes])
        of_T = np.repeat(np.arange(len(starts_U)), lengths_U)
        positions_T = np.arange(len(of_T)) + (starts_U - lengths_U.cumsum() + lengths_U)[of_T]
        blocks_T = tables[(widths_U.cumsum() - widths_U)[of_T] + positions_T // self._pool.block_size]
        new = slice(self._count, self._count + len(of_T))
        self._kept_4N[:, new] = blocks_T, positions_T, np.concatenate(following), clocks_U[of_T]
        self._put(new, torch.cat(features))
        self._count, self._waiting = new.stop, 0
        for requests in requests_of:
            for request in requests:
                request.unread = True
        self._steps.clear()

    def _find(self, blocks: Iterable[int]) -> np.ndarray:
        """Kept tokens that belong to what these blocks hold now, int64 [N]."""
        since = np.full(self._pool.num_blocks + 1, self._pool.clock + 1)  # the last one stands for _GONE
        for block in blocks:
            since[block] = self._pool.handed_out(block)
        block_N, _, _, clock_N = self._kept_4N[:, : self._count]
        return np.flatnonzero(clock_N >= since[block_N])

    def _read(self, rows_N: np.ndarray) -> None:
        """The drafter reads these, and they are gone."""
        if not len(rows_N):
            return
        blocks_N, positions_N, next_N, _ = self._kept_4N[:, rows_N]
        self._kept_4N[0, rows_N] = _GONE
        features_NF = self._take(rows_N)
        size = self._pool.block_size
        tables_NB = np.zeros((len(rows_N), int(positions_N.max()) // size + 1), np.int64)
        tables_NB[np.arange(len(rows_N)), positions_N // size] = blocks_N  # nobody looks at what lies before
        device, dtype = features_NF.device, features_NF.dtype
        read = Pass(next_N, positions_N, np.ones_like(next_N), tables_NB, size, device, dtype)
        self._drafter.extend(read, features_NF, read.tokens)

    def _make_room(self) -> None:
        """Close up; where much is left give up what nobody holds, and where that is not enough let the rest be read."""
        self._look_into()
        blocks = self._blocks(slice(self._count))
        rows_N = self._find(blocks)
        if len(rows_N) > LIMIT // 2:
            given_up_N = self._find(block for block in blocks if not self._pool.held(block))
            self._pool.leave_unheard(self._blocks(given_up_N))
            rows_N = np.setdiff1d(rows_N, given_up_N)
        if len(rows_N) > LIMIT // 2:
            self._read(rows_N)
            rows_N = rows_N[:0]
        self._count = len(rows_N)
        self._kept_4N[:, : self._count] = self._kept_4N[:, rows_N]
        self._features_NF[: self._count] = self._take(rows_N)

    def _blocks(self, rows_N: np.ndarray | slice) -> list[int]:
        """The blocks of these tokens, each once."""
        return [block for block in np.unique(self._kept_4N[0, rows_N]).tolist() if block != _GONE]

    def _take(self, rows_N: np.ndarray) -> Tensor:
        return self._features_NF[torch.from_numpy(rows_N).to(self._features_NF.device)]

    def _put(self, rows: slice, features_TF: Tensor) -> None:
        if not len(self._features_NF):
            self._features_NF = features_TF.new_empty(LIMIT + LONG, features_TF.shape[1])
        elif self._features_NF.dtype != features_TF.dtype:  # C++ passes give float32, whatever it was before
            self._features_NF = self._features_NF.to(features_TF.dtype)
        self._features_NF[rows] = features_TF

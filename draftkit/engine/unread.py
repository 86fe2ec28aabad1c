"""What the target has read and the drafter has not: while the drafter rests, its context is not written step by step.

The features of a step in which nobody drafts are kept, by the block that they belong to, until somebody is to draft from that
block. Then they are taken in together: a pass over one token costs the drafter nearly as much as one over hundreds. Most are
never asked for. What lies in blocks of finished answers is given up when LIMIT is reached, and with the block when its place is
needed for something else.

Where the drafter rests for long nearly all would be given up. So requests become deaf, those that read their prompt too: no
features are asked for, and their blocks are left unheard. The target may go on from such blocks, but a request that does is
deaf as well: its drafter's context has holes, and it does not draft.

Shapes: T tokens of a pass, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.fast_drafter import FastDrafter
from draftkit.engine.fast_eagle import FastEagle
from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.passes import Pass
from draftkit.engine.running import Running

LIMIT = 8192  # tokens: of a target with 8 billion parameters 300 MB in bfloat16
LONG = 256  # tokens of a pass that is read at once: so many are no cheaper beside others


@dataclass(slots=True, eq=False)
class _Step:
    """One pass. What a block got after `clock` (see `BlockPool.clock`) is not this."""

    requests: Sequence[Running]
    read: Pass
    features_TF: Tensor
    next_T: np.ndarray
    clock: int
    left: int  # tokens of it that are still kept


class Unread:
    """Tokens that `drafter` has yet to read."""

    def __init__(self, drafter: FastDrafter | FastEagle, pool: BlockPool) -> None:
        self._drafter, self._pool = drafter, pool
        self._steps: list[_Step] = []  # not looked into yet: nearly every step is added, few are read
        self._rows: dict[int, list[tuple[_Step, int]]] = {}  # by block: steps that read a token of it, and in which row
        self._count = 0  # tokens whose features are in memory: whole steps

    def add(self, requests: Sequence[Running], step: Pass, features_TF: Tensor, next_T: np.ndarray) -> None:
        """Keep a pass of these requests, with the token behind each of its tokens; nothing of it may be rejected."""
        self._steps.append(_Step(requests, step, features_TF, next_T, self._pool.clock, len(step)))
        self._count += len(step)
        if self._count >= LIMIT:
            self._make_room()

    def read(self, requests: Sequence[Running]) -> None:
        """The drafter reads, in one pass, all that it has not read of these requests, reused prefixes included."""
        self._sort()
        behind = [request for request in requests if request.unread]
        if behind:
            self._read({block for request in behind for block in request.table.blocks if block in self._rows})
        for request in behind:
            request.unread = False

    def leave(self, requests: Sequence[Running]) -> None:
        """What these requests are about to read is read without features, and more will follow: they are deaf from here on."""
        for request in requests:
            if request.table.heard:
                self._leave(request)

    def _leave(self, request: Running) -> None:
        self._sort()
        blocks = request.table.blocks
        missed = blocks[request.computed // self._pool.block_size :]
        unread = [block for block in blocks if self._alive(block)]
        if self._pool.shared(unread):  # somebody drafts from what is unread
            self._read(unread)
        else:
            self._forget(unread)
            missed = unread + missed
        self._pool.leave_unheard(missed)
        request.deaf, request.table.heard = True, False

    def _sort(self) -> None:
        size = self._pool.block_size
        for step in self._steps:
            read = step.read
            blocks_T = read.tables_RB[read.row_T, read.positions_T // size]
            for row, block in enumerate(blocks_T.tolist()):
                self._rows.setdefault(block, []).append((step, row))
            for request in step.requests:
                request.unread = True
        self._steps.clear()

    def _alive(self, block: int) -> list[tuple[_Step, int]]:
        """Rows that belong to what the block holds now."""
        handed_out = self._pool.handed_out(block)
        return [(step, row) for step, row in self._rows.get(block, ()) if step.clock >= handed_out]

    def _read(self, blocks: Iterable[int]) -> None:
        rows = [(block, step, row) for block in blocks for step, row in self._alive(block)]
        self._forget(blocks)
        if not rows:
            return
        size = self._pool.block_size
        wanted: dict[_Step, list[tuple[int, int]]] = {}
        for block, step, row in rows:
            wanted.setdefault(step, []).append((block, row))
        blocks_T, rows_T = np.array([pair for pairs in wanted.values() for pair in pairs]).T
        ends = np.cumsum([len(pairs) for pairs in wanted.values()])
        chosen = list(zip(wanted, np.split(rows_T, ends[:-1]), strict=True))
        positions_T = np.concatenate([step.read.positions_T[own] for step, own in chosen])
        next_T = np.concatenate([step.next_T[own] for step, own in chosen])
        features_TF = torch.cat([step.features_TF[torch.from_numpy(own).to(step.features_TF.device)] for step, own in chosen])
        tables_TB = np.zeros((len(rows), int(positions_T.max()) // size + 1), np.int64)
        tables_TB[np.arange(len(rows)), positions_T // size] = blocks_T  # nobody looks at what lies before
        device, dtype = features_TF.device, features_TF.dtype
        read = Pass(next_T, positions_T, np.ones_like(next_T), tables_TB, size, device, dtype)
        self._drafter.extend(read, features_TF, read.tokens)

    def _make_room(self) -> None:
        """Give up what nobody holds; where that is not much, read the rest."""
        self._sort()
        free = [block for block in self._rows if not self._pool.held(block)]
        self._pool.leave_unheard([block for block in free if self._alive(block)])
        self._forget(free)
        if self._count > LIMIT // 2:
            self._read(list(self._rows))

    def _forget(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            for step, _ in self._rows.pop(block, ()):
                step.left -= 1
                self._count -= len(step.read) if not step.left else 0

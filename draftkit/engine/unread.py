"""What the target has read and the drafter has not: while the drafter rests, its context is not written step by step.

A pass over one token per request costs the drafter nearly as much as one over hundreds; so the features of decoding steps
are kept, and taken in together before the drafter runs again, before blocks change hands, and when LIMIT is reached.

Where the drafter rests for long most of them would be taken in for nothing. So requests become deaf: no features are asked
for, and their blocks are left unheard. The target may go on from such blocks, but a request that does is deaf as well: its
drafter's context has holes, and it does not draft.

Shapes: T tokens of a pass, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.fast_drafter import FastDrafter
from draftkit.engine.fast_eagle import FastEagle
from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.passes import Pass
from draftkit.engine.running import Running

LIMIT = 1024  # tokens


class Unread:
    """Passes of one token per request that `drafter` has yet to read, oldest first."""

    def __init__(self, drafter: FastDrafter | FastEagle, pool: BlockPool) -> None:
        self._drafter, self._pool = drafter, pool
        self._tokens: list[tuple[int, int, int, int]] = []  # block, position, token behind it, number of the step
        self._features: list[Tensor] = []  # of one step each
        self._steps = 0
        self._began: dict[int, int] = {}  # row of each request with unread tokens, position of the first one
        self._dropped = np.zeros(pool.num_blocks, np.int64)  # by block: what earlier steps wrote there is not read any more

    def add(self, requests: Sequence[Running], features_TF: Tensor, next_tokens_T: np.ndarray) -> None:
        """Keep a pass for later, which read one token of each request; nothing of it may be rejected."""
        self._steps += 1
        size = self._pool.block_size
        for request, following in zip(requests, next_tokens_T.tolist(), strict=True):
            position = request.computed
            self._began.setdefault(request.row, position)
            self._tokens.append((request.table.blocks[position // size], position, following, self._steps))
        self._features.append(features_TF)
        if len(self._tokens) >= LIMIT:
            self.read()

    def leave(self, requests: Sequence[Running]) -> None:
        """One token of each request is read without features, now, and more will follow: from here on they are deaf."""
        size = self._pool.block_size
        for request in requests:
            if request.deaf:
                self._pool.leave_unheard(request.table.blocks[request.computed // size :])
                continue
            own = request.table.blocks[self._began.get(request.row, request.computed) // size :]
            if self._pool.shared(own):  # somebody drafts from what is unread
                self.read()
                own = request.table.blocks[request.computed // size :]
            self._began.pop(request.row, None)
            request.deaf = True
            self._pool.leave_unheard(own)
            self._dropped[own] = self._steps + 1

    def release(self, request: Running) -> None:
        """Before the blocks of a request go to somebody else."""
        if request.row in self._began:
            self.read()

    def read(self) -> None:
        """The drafter reads all that was kept, in one pass of as many requests as there are tokens."""
        if not self._tokens:
            return
        blocks_T, positions_T, next_T, numbers_T = np.array(self._tokens, np.int64).T
        features_TF = torch.cat(self._features)
        self._tokens, self._features = [], []
        self._began.clear()
        alive = np.flatnonzero(numbers_T >= self._dropped[blocks_T])
        if len(alive) < len(blocks_T):
            blocks_T, positions_T, next_T = blocks_T[alive], positions_T[alive], next_T[alive]
            features_TF = features_TF[torch.from_numpy(alive).to(features_TF.device)]
        if len(alive):
            size, ones_T = self._pool.block_size, np.ones_like(next_T)
            tables_TB = np.zeros((len(alive), int(positions_T.max()) // size + 1), np.int64)
            tables_TB[np.arange(len(alive)), positions_T // size] = blocks_T  # nobody looks at what lies before
            step = Pass(next_T, positions_T, ones_T, tables_TB, size, features_TF.device, features_TF.dtype)
            self._drafter.extend(step, features_TF, step.tokens)

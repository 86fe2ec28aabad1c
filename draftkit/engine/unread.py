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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.fast_drafter import FastDrafter
from draftkit.engine.fast_eagle import FastEagle
from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.passes import Pass
from draftkit.engine.running import Running

LIMIT = 1024  # tokens


@dataclass(frozen=True)
class _Kept:
    number: int  # of the step
    step: Pass
    features_TF: Tensor
    next_tokens_T: np.ndarray


class Unread:
    """Passes of one token per request that `drafter` has yet to read, oldest first."""

    def __init__(self, drafter: FastDrafter | FastEagle, pool: BlockPool) -> None:
        self._drafter, self._pool = drafter, pool
        self._kept: list[_Kept] = []
        self._tokens = self._steps = 0
        self._began: dict[int, int] = {}  # row of each request with unread tokens, position of the first one
        self._dropped = np.zeros(pool.num_blocks, np.int64)  # by block: what earlier steps wrote there is not read any more

    def add(self, requests: Sequence[Running], step: Pass, features_TF: Tensor, next_tokens_T: np.ndarray) -> None:
        """Keep a pass for later; nothing of it may be rejected."""
        for request in requests:
            self._began.setdefault(request.row, request.computed)
        self._steps += 1
        self._kept.append(_Kept(self._steps, step, features_TF, next_tokens_T))
        self._tokens += len(step)
        if self._tokens >= LIMIT:
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
        if not self._kept:
            return
        kept, count, steps = self._kept, self._tokens, [k.step for k in self._kept]
        self._kept, self._tokens = [], 0
        self._began.clear()
        first = steps[0]
        tables_TB = np.zeros((count, max(step.tables_RB.shape[1] for step in steps)), np.int64)
        end = 0
        for step in steps:
            end += len(step)
            tables_TB[end - len(step) : end, : step.tables_RB.shape[1]] = step.tables_RB
        tokens_T = np.concatenate([step.tokens_T for step in steps])
        starts_T = np.concatenate([step.starts_R for step in steps])
        next_T = np.concatenate([k.next_tokens_T for k in kept])
        features_TF = torch.cat([k.features_TF for k in kept])
        numbers_T = np.repeat([k.number for k in kept], [len(step) for step in steps])
        alive = np.flatnonzero(numbers_T >= self._dropped[tables_TB[np.arange(count), starts_T // first.block_size]])
        if len(alive) < count:
            tables_TB, tokens_T, starts_T, next_T = tables_TB[alive], tokens_T[alive], starts_T[alive], next_T[alive]
            features_TF = features_TF[torch.from_numpy(alive).to(first.device)]
        if len(alive):
            ones_T = np.ones(len(alive), np.int64)
            whole = Pass(tokens_T, starts_T, ones_T, tables_TB, first.block_size, first.device, first.dtype)
            self._drafter.extend(whole, features_TF, torch.from_numpy(next_T).to(first.device))

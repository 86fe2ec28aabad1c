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

LIMIT = 4096  # tokens


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
            self._kept = [kept for kept in self._kept if self._alive(kept).any()]
            self._tokens = sum(len(kept.step) for kept in self._kept)
            if self._tokens > LIMIT // 2:
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
        kept, self._kept, self._tokens = self._kept, [], 0
        self._began.clear()
        alive = [self._alive(k) for k in kept]
        count = int(sum(mask.sum() for mask in alive))
        if not count:
            return
        first = kept[0].step
        tables_TB = np.zeros((count, max(k.step.tables_RB.shape[1] for k in kept)), np.int64)
        end = 0
        for k, mask in zip(kept, alive, strict=True):
            end, begin = end + int(mask.sum()), end
            tables_TB[begin:end, : k.step.tables_RB.shape[1]] = k.step.tables_RB[mask]
        whole = Pass(
            np.concatenate([k.step.tokens_T[mask] for k, mask in zip(kept, alive, strict=True)]),
            np.concatenate([k.step.starts_R[mask] for k, mask in zip(kept, alive, strict=True)]),
            np.ones(count, np.int64),
            tables_TB,
            first.block_size,
            first.device,
            first.dtype,
        )
        mask_T = np.concatenate(alive)
        following = torch.from_numpy(np.concatenate([k.next_tokens_T for k in kept])[mask_T]).to(first.device)
        features_TF = torch.cat([k.features_TF for k in kept])
        if count < len(mask_T):
            features_TF = features_TF[torch.from_numpy(np.flatnonzero(mask_T)).to(first.device)]
        self._drafter.extend(whole, features_TF, following)

    def _alive(self, kept: _Kept) -> np.ndarray:
        """Which tokens of a step are still to be read, bool [T]."""
        step = kept.step
        blocks_T = step.tables_RB[np.arange(len(step)), step.starts_R // step.block_size]
        alive_T: np.ndarray = kept.number >= self._dropped[blocks_T]
        return alive_T

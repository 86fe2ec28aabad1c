"""What the target has read and the drafter has not: while the drafter rests, its context is not written step by step.

A pass over one token per request costs the drafter nearly as much as one over hundreds; so the features of decoding steps
are kept, and taken in together before the drafter runs again, before blocks change hands, and when LIMIT is reached.

Shapes: T tokens of a pass, F features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.fast_drafter import FastDrafter
from draftkit.engine.fast_eagle import FastEagle
from draftkit.engine.passes import Pass

LIMIT = 256  # tokens


class Unread:
    """Passes of one token per request that `drafter` has yet to read, oldest first."""

    def __init__(self, drafter: FastDrafter | FastEagle) -> None:
        self._drafter = drafter
        self._kept: list[tuple[Pass, Tensor, np.ndarray]] = []
        self._tokens = 0

    def add(self, step: Pass, features_TF: Tensor, next_tokens_T: np.ndarray) -> None:
        """Keep a pass for later; nothing of it may be rejected."""
        self._kept.append((step, features_TF, next_tokens_T))
        self._tokens += len(step)
        if self._tokens >= LIMIT:
            self.read()

    def read(self) -> None:
        """The drafter reads all that was kept, in one pass of as many requests as there are tokens."""
        if not self._kept:
            return
        steps = [step for step, _, _ in self._kept]
        tables_TB = np.zeros((self._tokens, max(step.tables_RB.shape[1] for step in steps)), np.int64)
        end = 0
        for step in steps:
            end += len(step)
            tables_TB[end - len(step) : end, : step.tables_RB.shape[1]] = step.tables_RB
        whole = Pass(
            np.concatenate([step.tokens_T for step in steps]),
            np.concatenate([step.positions_T for step in steps]),
            np.ones(self._tokens, np.int64),
            tables_TB,
            steps[0].block_size,
            steps[0].device,
            steps[0].dtype,
        )
        following = torch.from_numpy(np.concatenate([tokens for _, _, tokens in self._kept])).to(whole.device)
        features_TF = torch.cat([features for _, features, _ in self._kept])
        self._kept, self._tokens = [], 0
        self._drafter.extend(whole, features_TF, following)

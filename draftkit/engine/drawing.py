"""Drawing the tokens of proposals, for many requests at once, and keeping what they were drawn from.

Shapes: D requests that draft, G = gamma drafted tokens, V vocabulary, C columns of a drafter's logits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.adjust import Adjustment, wide
from draftkit.ops.native_sampling import NativeRows
from draftkit.ops.sampling import DenseRows, Distributions, distributions


@dataclass(frozen=True)
class Drawn:
    """What the tokens of D proposals were drawn from: rows [D * G], request by request; and, of rows that are
    described, the probability of each token, float64 [D, G]."""

    rows: Distributions
    chances_DG: np.ndarray | None

    def dense(self) -> Tensor:
        """Probabilities [D * G, V]."""
        return self.rows.dense()


class Drafts(NamedTuple):
    """Proposals: tokens int64 [D, G], what they were drawn from (None: greedily), confidences in (0, 1) [D,
    G], or without a confidence head the largest probabilities [D, G] (see `Proposal`)."""

    tokens_DG: Tensor
    drawn: Drawn | None
    confidence_DG: Tensor | None
    largest_DG: Tensor | None


class Drawing:
    """How drafted tokens are drawn, position by position: settings `SETTING` [D] and uniforms [D, G] of the
    requests.

    `adjustments_D` changes the logits of single requests first. When all rows are greedy no distribution is
    kept. `seconds` is the time that adjusting took, and drawing outside a compiled pass.
    """

    def __init__(
        self, settings_D: np.ndarray, uniforms_DG: np.ndarray, adjustments_D: Sequence[Adjustment | None] = ()
    ) -> None:
        self.settings_D, self.uniforms_DG = (
            np.ascontiguousarray(settings_D),
            np.ascontiguousarray(uniforms_DG),
        )
        self.greedy = bool((settings_D["temperature"] == 0).all())
        self.adjusts = any(adjustments_D)
        self._adjusted = [(i, a, list[int]()) for i, a in enumerate(adjustments_D) if a is not None]
        self._rows: list[Distributions] = []
        self._logits: list[Tensor] = []
        self._chances: list[np.ndarray] = []
        self.seconds = 0.0

    def adjusts_row(self, row: int) -> bool:
        """Whether something but sampling settings changes this request's logits."""
        return any(row == adjusted for adjusted, _, _ in self._adjusted)

    def adjust(self, logits_DV: Tensor, position: int) -> None:
        """Change logits of one position in place."""
        began = time.perf_counter()
        for row, adjustment, drafts in self._adjusted:
            adjustment.apply(logits_DV[row : row + 1], drafts, position)
        self.seconds += time.perf_counter() - began

    def note(self, tokens_D: Tensor) -> None:
        """Later positions of adjusted requests follow these tokens."""
        for row, _, drafts in self._adjusted:
            drafts.append(int(tokens_D[row]))

    def __call__(self, logits_DV: Tensor, position: int) -> Tensor:
        """Tokens [D] of one position, from left to right."""
        if self.adjusts:
            logits_DV = wide(logits_DV)
            self.adjust(logits_DV, position)
        began = time.perf_counter()
        tokens_D = (
            logits_DV.argmax(-1) if self.greedy else self._draw(logits_DV, self.uniforms_DG[:, position])
        )
        self.seconds += time.perf_counter() - began
        self.note(tokens_D)
        return tokens_D

    def _draw(self, logits_DV: Tensor, uniforms_D: np.ndarray) -> Tensor:
        rows = distributions(logits_DV, self.settings_D)
        self._rows.append(rows)
        if isinstance(rows, DenseRows):
            return rows.draw(uniforms_D)
        tokens_D, chances_D = rows.draw_with_chances(uniforms_D)
        self._chances.append(chances_D)
        return torch.from_numpy(tokens_D)

    def drawn(self) -> Drawn | None:
        """What all positions so far were drawn from; None when all are greedy."""
        described = [rows for rows in self._rows if isinstance(rows, NativeRows)]
        if described:
            return Drawn(NativeRows.interleave(described), np.stack(self._chances, 1))
        if not self._rows:
            return None
        return Drawn(DenseRows(torch.stack([rows.dense() for rows in self._rows], 1).flatten(0, 1)), None)

"""Who drafts in this step, and how many drafted tokens of each request are verified.

Shapes: R requests that decode, D of them that draft, G = gamma drafted positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from draftkit.engine.metrics import Tally
from draftkit.engine.running import Running
from draftkit.schedule.planner import admit, budget_from, survival_of
from draftkit.schedule.step_rate import StepRate

RETRY_STEPS = 32  # steps without drafting after which a drafter that did not pay is tried again


class LengthPlanner:
    """Fixed lengths without a `step_rate`. With one, lengths are planned as the paper does in production: survivals of
    EARLIER steps set how many drafted tokens the pass holds, the survivals of this step say which. Without a confidence
    head, how often each position was accepted so far stands in.

    A seeded sample keeps its whole proposal (its tokens must not depend on the load). Nobody verifies more tokens than
    the answer may still have.
    """

    def __init__(self, tally: Tally, step_rate: StepRate | None) -> None:
        self._tally, self.step_rate = tally, step_rate
        self.gamma = len(tally.per_position)
        self._rested = 0
        self._budget = 0

    def choose_drafting(self, decoding: Sequence[Running]) -> list[int]:
        """Indices of the requests that draft in this step."""
        able = [i for i, r in enumerate(decoding) if r.gamma and self.most(r)]
        if self.step_rate is None or not able:
            return able
        past_RG = np.ones((len(able), self.gamma))
        if self._rested < RETRY_STEPS:
            for row, index in enumerate(able):
                survival_G = decoding[index].survival_G
                if survival_G is not None:
                    past_RG[row] = survival_G
        self._budget = budget_from(past_RG, self.step_rate)
        self._rested = 0 if self._budget else self._rested + 1
        return able if self._budget else [i for i in able if decoding[i].keeps_proposal]

    def lengths(self, drafting: Sequence[Running], confidence_DG: np.ndarray | None) -> np.ndarray:
        """How many drafted tokens of each are verified, int64 [D]; `survival_G` of each request is renewed."""
        most_D = np.array([self.most(r) for r in drafting], np.int64)
        if self.step_rate is None:
            return most_D
        if confidence_DG is None:
            confidence_DG = np.broadcast_to(self._tally.acceptance_G, (len(drafting), self.gamma))
        survival_DG, _ = survival_of(confidence_DG)
        for request, survival_G in zip(drafting, survival_DG, strict=True):
            request.survival_G = survival_G
        admitted_D = admit(survival_DG, self._budget)
        whole_D = np.array([r.keeps_proposal for r in drafting])
        return np.where(whole_D, most_D, np.minimum(admitted_D, most_D))

    def most(self, request: Running) -> int:
        """Drafted tokens of this request that may be of use."""
        return self.gamma if request.keeps_proposal else min(self.gamma, request.limit - request.made - 1)

"""The survivals that a budget may be computed from: those of earlier steps.

Two steps lie between a proposal and the budget that uses it, as in the paper: the budget of step n + 2 can then be worked
out while step n + 1 runs. A request without a past is taken to be like the others were lately.

Shapes: R requests of a step, S slots (a request keeps its slot), G = gamma drafted positions.
"""

from __future__ import annotations

import numpy as np

from draftkit.schedule.step_rate import Floats, Ints

LAG = 2  # steps
MEMORY = 0.05  # weight of one step in the running mean


class SurvivalHistory:
    """Per slot the survivals of the last proposals. Call `push` once per step with what was drafted in it."""

    def __init__(self, slots: int, gamma: int) -> None:
        self._past_SLG = np.full((slots, LAG, gamma), np.nan)
        self._mean_G = np.ones(gamma)  # optimistic until the first proposal is old enough: the drafter is tried at once
        self._weight = 1.0
        self._fresh_G: list[Floats] = []  # means of the last steps, not yet old enough to be used

    def push(self, slots_R: Ints, survival_RG: Floats) -> None:
        """Remember the survivals of this step's proposals. While the drafter rests nothing is pushed: the last
        survivals stand, and a smaller load wakes it."""
        if not len(slots_R):
            return
        self._past_SLG[slots_R, :-1] = self._past_SLG[slots_R, 1:]
        self._past_SLG[slots_R, -1] = survival_RG
        self._fresh_G.append(survival_RG.mean(0))
        if len(self._fresh_G) >= LAG:
            self._mean_G = (1 - self._weight) * self._mean_G + self._weight * self._fresh_G.pop(0)
            self._weight = max(MEMORY, self._weight / (1 + self._weight))  # a plain mean first, then a running one

    def forget(self, slots_R: Ints) -> None:
        """The requests of these slots are gone."""
        self._past_SLG[slots_R] = np.nan

    def stale(self, slots_R: Ints) -> Floats:
        """For the next step: survivals [R, G] of the proposals two steps before it, else the running mean."""
        rows_RG = self._past_SLG[slots_R, 0]
        return np.where(np.isnan(rows_RG), self._mean_G, rows_RG)

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
HOPE = 0.0005  # share of the way to certainty by which the mean rises in a step without drafting


class SurvivalHistory:
    """Per slot the survivals of the last proposals, and their running mean over all requests.

    Call `push` after a step that drafted and `rest` after one that did not. `prior_G` is the mean survival to begin with,
    as calibration measured it; without one the drafter is given every chance.
    """

    def __init__(self, slots: int, gamma: int, prior_G: Floats | None = None) -> None:
        self._past_SLG = np.full((slots, LAG, gamma), np.nan)
        self._mean_G = np.ones(gamma) if prior_G is None else np.array(prior_G, np.float64)
        self._weight = 1.0 if prior_G is None else MEMORY
        self._fresh_G: list[Floats] = []  # means of the last steps, not yet old enough to be used

    def push(self, slots_R: Ints, survival_RG: Floats) -> None:
        """Remember the survivals of this step's proposals."""
        self._past_SLG[:, :-1] = self._past_SLG[:, 1:]
        self._past_SLG[:, -1] = np.nan
        self._past_SLG[slots_R, -1] = survival_RG
        if not len(slots_R):
            return
        self._fresh_G.append(survival_RG.mean(0))
        if len(self._fresh_G) >= LAG:
            self._mean_G = (1 - self._weight) * self._mean_G + self._weight * self._fresh_G.pop(0)
            self._weight = max(MEMORY, self._weight / (1 + self._weight))  # a plain mean first, then a running one

    def rest(self) -> None:
        """A step without drafting: what is known of single requests grows too old, and the mean slowly becomes more
        hopeful, so that a drafter that rests is tried again now and then."""
        self.push(np.zeros(0, np.int64), np.zeros((0, self._mean_G.shape[0])))
        self._mean_G = self._mean_G + HOPE * (1 - self._mean_G)

    def forget(self, slots_R: Ints) -> None:
        """The requests of these slots are gone."""
        self._past_SLG[slots_R] = np.nan

    def stale(self, slots_R: Ints) -> Floats:
        """For the next step: survivals [R, G] of the proposals two steps before it, else the running mean."""
        rows_RG = self._past_SLG[slots_R, 0]
        return np.where(np.isnan(rows_RG), self._mean_G, rows_RG)

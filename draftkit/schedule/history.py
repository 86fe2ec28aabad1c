"""The survivals that a budget may be computed from: those of the step before.

The paper lets two steps lie between them, because its budget of a step is worked out while the step before it runs. Here
steps do not overlap, so one is enough, and younger survivals say more. A request without a past is taken to be like the
others were lately.

Shapes: R requests of a step, S slots (a request keeps its slot), G = gamma drafted positions.
"""

from __future__ import annotations

import numpy as np

from draftkit.schedule.step_rate import Floats, Ints

MEMORY = 0.05  # weight of one step in the running mean


class SurvivalHistory:
    """Per slot the survivals of the last proposal, and their running mean over all requests.

    Call `push` after a step that drafted and `rest` after one that did not. `prior_G` is the mean survival to begin with,
    as calibration measured it; without one the drafter is given every chance.
    """

    def __init__(self, slots: int, gamma: int, prior_G: Floats | None = None) -> None:
        self._past_SG, self._young = np.full((slots, gamma), np.nan), False
        self._mean_G = np.ones(gamma) if prior_G is None else np.array(prior_G, np.float64)
        self._weight = 1.0 if prior_G is None else MEMORY

    def push(self, slots_R: Ints, survival_RG: Floats) -> None:
        """Remember the survivals of this step's proposals; those of requests that did not draft are too old now."""
        self._past_SG[:], self._young = np.nan, True
        self._past_SG[slots_R] = survival_RG
        self._mean_G = (1 - self._weight) * self._mean_G + self._weight * survival_RG.mean(0)
        self._weight = max(MEMORY, self._weight / (1 + self._weight))  # a plain mean first, then a running one

    def rest(self) -> None:
        """A step without drafting: what is known of single requests is too old now."""
        if self._young:
            self._past_SG[:], self._young = np.nan, False

    def forget(self, slots_R: Ints) -> None:
        """The requests of these slots are gone."""
        self._past_SG[slots_R] = np.nan

    def stale(self, slots_R: Ints) -> Floats:
        """For the next step: survivals [R, G] of the proposals in the step before it, else the running mean."""
        rows_RG = self._past_SG[slots_R]
        return np.where(np.isnan(rows_RG), self._mean_G, rows_RG)

    def hopeful(self, requests: int) -> Floats:
        """The most that may be hoped for, [R, G]: one request may be certain; the mean over R deviates 1 / sqrt(R) as much."""
        return np.tile(self._mean_G + (1 - self._mean_G) / requests**0.5, (requests, 1))

"""Confidence for drafters without a confidence head: a logistic regression that learns while serving.

    c_k = sigmoid(w logit(m_k) + b_k),  m_k = the largest probability of the drafter's distribution at
      position k

with one slope and one intercept per position. m_k is known before x_k is drawn, so a plan by c_k is
lossless. Only positions whose verdict is known are learned from: those before the first rejection, and the
rejected one, as far as they were verified. Whether a position is verified depends on m_1..m_k only, which
are in the regression or before it.

Shapes: R requests, G = gamma drafted positions, M remembered observations.
"""

from __future__ import annotations

import numpy as np

from draftkit.schedule.calibration import logit, sigmoid
from draftkit.schedule.step_rate import Floats, Ints

EDGE = 1e-4  # m is kept this far from 0 and 1
PRIOR_WEIGHT = 4.0  # observations' worth of belief in w = 1, b = 0, that is c = m
NEWTON_STEPS = 6


class AcceptanceEstimator:
    """An estimate per drafted position; `confidence` and `observe` are called in every step."""

    def __init__(self, gamma: int, memory: int = 20_000, refit_every: int = 2_000) -> None:
        self.gamma, self._refit_every = gamma, refit_every
        self.weights = np.concatenate([[1.0], np.zeros(gamma)])  # w, b_1..b_G
        self._logit_M, self._position_M = np.zeros(memory), np.zeros(memory, np.int64)
        self._kept_M = np.zeros(memory)
        self.seen, self._next_refit = 0, min(refit_every, 200)

    def confidence(self, draft_max_RG: Floats) -> Floats:
        """Estimated probability that each drafted token is accepted given those before, [R, G]; NaN counts as
        zero."""
        return sigmoid(self.weights[0] * _logit(draft_max_RG) + self.weights[1:])

    def observe(self, draft_max_RG: Floats, accepted_R: Ints, verified_R: Ints) -> None:
        """Learn from a step: `accepted_R` of the first `verified_R` drafted tokens were kept."""
        position_G = np.arange(self.gamma)
        known_RG = (position_G <= accepted_R[:, None]) & (position_G < verified_R[:, None])
        rows, positions = np.nonzero(known_RG)
        place = (self.seen + np.arange(len(rows))) % len(self._logit_M)
        self._logit_M[place] = _logit(draft_max_RG)[rows, positions]
        self._position_M[place] = positions
        self._kept_M[place] = positions < accepted_R[rows]
        self.seen += len(rows)
        if self.seen >= self._next_refit:
            self._fit()
            self._next_refit = self.seen + min(self._refit_every, self.seen)

    def _fit(self) -> None:
        """Iteratively reweighted least squares from the present weights, with a Gaussian prior at c = m."""
        count = min(self.seen, len(self._logit_M))
        design = np.zeros((count, 1 + self.gamma))
        design[:, 0] = self._logit_M[:count]
        design[np.arange(count), 1 + self._position_M[:count]] = 1.0
        prior = np.concatenate([[1.0], np.zeros(self.gamma)])
        for _ in range(NEWTON_STEPS):
            chance = sigmoid(design @ self.weights)
            slope = design.T @ (self._kept_M[:count] - chance) - PRIOR_WEIGHT * (self.weights - prior)
            curvature = (design * (chance * (1 - chance))[:, None]).T @ design + PRIOR_WEIGHT * np.eye(
                1 + self.gamma
            )
            self.weights = self.weights + np.linalg.solve(curvature, slope)


def _logit(chance: Floats) -> Floats:
    return logit(np.nan_to_num(np.asarray(chance, np.float64)), EDGE)

"""Which requests draft in a step, and how many drafted tokens of each are verified.

Shapes: R requests that decode, D of them that draft, G = gamma drafted positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from draftkit.engine.request import Request
from draftkit.schedule.calibration import Calibration
from draftkit.schedule.estimator import AcceptanceEstimator
from draftkit.schedule.gate import Gate, GateState
from draftkit.schedule.planner import BudgetPlanner, survival_of
from draftkit.schedule.step_rate import StepRate


class LengthPlanner:
    """Fixed lengths without a step rate. With one the gate says whether to draft, and lengths are planned as
    the paper does in production: survivals of EARLIER steps set how many drafted tokens the pass holds, the
    survivals of this step say which. Without a confidence head the estimator says how likely a drafted token
    is to be accepted.

    A seeded sample keeps its whole proposal (its tokens must not depend on the load), so it drafts in every
    step. No request verifies more tokens than its answer may still have. `rows` are the places of running
    requests.
    """

    def __init__(
        self, rows: int, gamma: int, step_rate: StepRate | None = None, calibration: Calibration | None = None
    ) -> None:
        self.gamma, self._calibration = gamma, calibration
        self._budgets = BudgetPlanner(rows, gamma, step_rate) if step_rate is not None else None
        self._gate = Gate()
        self._estimator = AcceptanceEstimator(gamma)

    @property
    def step_rate(self) -> StepRate | None:
        """What a step is taken to cost; None where lengths are fixed."""
        return self._budgets.step_rate if self._budgets is not None else None

    @property
    def gate_state(self) -> GateState | None:
        """Whether drafting pays at the present load; None before that was measured, and where lengths are
        fixed, so that every step drafts."""
        return self._gate.state

    def drafting(self, decoding: Sequence[Request]) -> list[int]:
        """Indices of the requests that draft in this step."""
        able = [i for i, request in enumerate(decoding) if self._most(request) > 0]
        if self._budgets is None or self._gate.drafts(len(decoding)):
            return able
        return [i for i in able if decoding[i].keeps_proposal]

    def confidence(self, said_DG: np.ndarray | None, largest_DG: np.ndarray | None) -> np.ndarray | None:
        """Confidences [D, G] of this step's proposals: what the drafter's head said, calibrated, or what the
        estimator makes of the largest probabilities."""
        if said_DG is not None:
            return said_DG if self._calibration is None else self._calibration.apply(said_DG)
        if largest_DG is None or self._budgets is None:
            return None
        return self._estimator.confidence(largest_DG)

    def plan(
        self, drafting: Sequence[Request], confidence_DG: np.ndarray | None, others: int = 0
    ) -> np.ndarray:
        """Settle how many drafted tokens of each are verified, int64 [D]; `others` decode beside them without
        drafting."""
        most_D = np.array([self._most(r) for r in drafting], np.int64)
        if self._budgets is None or confidence_DG is None:
            return most_D
        survival_DG = survival_of(confidence_DG)
        admitted_D = self._budgets.plan(np.array([r.row for r in drafting]), survival_DG, others)
        whole_D = np.array([r.keeps_proposal for r in drafting])
        return np.where(whole_D, most_D, np.minimum(admitted_D, most_D))

    def observe(self, largest_DG: np.ndarray, lengths_D: np.ndarray, accepted_D: np.ndarray) -> None:
        """What verification found where there is no confidence head: of the first `lengths_D` drafted tokens
        `accepted_D` were kept."""
        if self._budgets is not None:
            self._estimator.observe(largest_DG, accepted_D, lengths_D)

    def record(
        self, decoding: Sequence[Request], drafting: Sequence[int], tokens: int, seconds: float
    ) -> None:
        """A step is over in which nobody read a prompt: which requests drafted, what it brought and how long
        it took. Nothing is learned from one in which nobody did as the gate said: seeded samples always
        draft, and an answer that ends may have no use for drafts."""
        if self._budgets is None:
            return
        drafts = self._gate.drafts(len(decoding))
        asked = [decoding[i] for i in drafting] if drafts else decoding
        if any(request.gamma and not request.keeps_proposal for request in asked):
            self._gate.record(len(decoding), tokens, seconds)

    def forget(self, row: int) -> None:
        """The request of this row is gone."""
        if self._budgets is not None:
            self._budgets.forget(np.array([row]))

    def _most(self, request: Request) -> int:
        """Drafted tokens of this request that may be of use."""
        left = self.gamma if request.keeps_proposal else min(self.gamma, request.limit - request.made - 1)
        return left if request.gamma else 0

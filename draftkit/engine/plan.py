"""Who drafts in this step, and how many drafted tokens of each request are verified.

Shapes: R requests that decode, D of them that draft, G = gamma drafted positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from draftkit.engine.request import StepOutput
from draftkit.engine.running import Running
from draftkit.schedule.calibration import Calibration
from draftkit.schedule.estimator import AcceptanceEstimator
from draftkit.schedule.planner import survival_of
from draftkit.schedule.speculation import Speculation
from draftkit.schedule.step_rate import StepRate

FOREVER = 2**62  # steps: who has not heard all will not draft, as long as nobody comes
LISTENING_QUIET = 64  # steps: then the account is asked whether to go on listening


class LengthPlanner:
    """Fixed lengths until `use` gives a step rate. From then on lengths are planned as the paper does in production:
    survivals of EARLIER steps set how many drafted tokens the pass holds, the survivals of this step say which. Without a
    confidence head the estimator says how likely a drafted token is to be accepted.

    A seeded sample keeps its whole proposal (its tokens must not depend on the load). Nobody verifies more tokens than
    the answer may still have.
    """

    def __init__(self, rows: int, gamma: int, calibration: Calibration | None = None) -> None:
        self._rows, self.gamma, self._calibration = rows, gamma, calibration
        self._speculation: Speculation | None = None
        self._estimator = AcceptanceEstimator(gamma)
        self._largest_DG: np.ndarray | None = None  # of this step's proposals, for the estimator
        self._able: Sequence[int] = ()
        self._budget = self._verified = 0  # drafted tokens of this step's pass: as planned; as it was then
        self._quiet = self._decoding = 0  # for so many steps nobody drafts, as long as so many requests decode,
        self._listening = False  # and whether some of them listen
        self._untold = 0  # of these steps, those that the account has yet to hear of: one by one they cost more

    @property
    def step_rate(self) -> StepRate | None:
        """What a step is taken to cost; None: lengths are fixed."""
        return self._speculation.step_rate if self._speculation is not None else None

    def rests_long(self, running: int) -> bool:
        """Nobody who does not have to will draft for many steps, while so many requests run."""
        self._tell()
        return self._speculation is not None and self._speculation.rests_long(running)

    @property
    def listening_in_rest(self) -> bool | None:
        """Within a rest: whether those who decode listen, which does not change then; None outside of one."""
        return self._listening if self._untold else None

    def looks(self, running: int) -> bool:
        """Requests that begin to decode, and make them so many, draft in their first step."""
        self._tell()
        return self._speculation is None or self._speculation.looks(running)

    def drafts(self, request: Running, running: int) -> bool:
        """Whether a request that begins now, and makes them so many, may come to draft before it ends."""
        return request.gamma > 0 and (request.keeps_proposal or not self.rests_long(running))

    def expected(self, requests: int) -> int:
        """Drafted tokens of so many requests that the next pass will hardly exceed: where lengths are planned, as many as the
        last one held (seeded samples' among them), since they change little from step to step."""
        return self.gamma * requests if self._speculation is None else self._verified

    def use(self, step_rate: StepRate) -> None:
        """Plan by this step rate; what was measured by another one is forgotten."""
        self._quiet = self._untold = 0
        self._speculation = Speculation(self._rows, self.gamma, step_rate)

    def choose_drafting(self, decoding: Sequence[Running]) -> list[int]:
        """Indices of the requests that draft in this step."""
        if self._quiet and len(decoding) == self._decoding:
            self._quiet, self._untold, self._able = self._quiet - 1, self._untold + 1, ()
            return []
        self._tell()
        self._verified = 0
        able, hearing = [], []
        for index, request in enumerate(decoding):  # in every step: one loop, few calls
            if request.gamma and (request.keeps_proposal or request.limit - request.made > 1):  # `most`, without the call
                able.append(index)
                if not request.deaf:
                    hearing.append(index)
        if self._speculation is None or not able:
            self._able = hearing
            return hearing
        self._able, self._budget = hearing, 0
        if hearing:
            self._budget = self._speculation.budget([decoding[i].row for i in hearing], len(decoding) - len(hearing))
        else:  # rests go by all the same
            self._speculation.rest(len(decoding), listening=False)
        if self._budget:
            return hearing
        seeded = [i for i in hearing if decoding[i].keeps_proposal]
        if hearing:
            self._quiet = 0 if seeded else min(self._speculation.sure_rest, LISTENING_QUIET)
        else:  # some may listen for others: those at their last token, and those that are not to draft
            self._quiet = 0 if any(request.table.heard for request in decoding) else FOREVER
        self._decoding, self._listening = len(decoding), bool(hearing)
        return seeded

    def confidence(self, said_DG: np.ndarray | None, largest_DG: np.ndarray | None) -> np.ndarray | None:
        """Confidences [D, G] of this step's proposals: what the drafter's head said, calibrated, or what the estimator makes
        of the largest probabilities."""
        self._largest_DG = None
        if said_DG is not None:
            return said_DG if self._calibration is None else self._calibration.apply(said_DG)
        if largest_DG is None or self._speculation is None:
            return None
        self._largest_DG = largest_DG
        return self._estimator.confidence(largest_DG)

    def lengths(self, drafting: Sequence[Running], confidence_DG: np.ndarray | None) -> np.ndarray:
        """How many drafted tokens of each are verified, int64 [D]."""
        most_D = np.array([self.most(r) for r in drafting], np.int64)
        if self._speculation is None or confidence_DG is None:
            self._verified = int(most_D.sum())
            return most_D
        survival_DG, _ = survival_of(confidence_DG)
        self._speculation.push(np.array([r.row for r in drafting]), survival_DG)
        admitted_D = self._speculation.lengths(survival_DG, self._budget)
        whole_D = np.array([r.keeps_proposal for r in drafting])
        lengths_D = np.where(whole_D, most_D, np.minimum(admitted_D, most_D))
        self._verified = int(lengths_D.sum())
        return lengths_D

    def observe(self, lengths_D: np.ndarray, accepted_D: np.ndarray) -> None:
        """What verification found: of the first `lengths_D` drafted tokens `accepted_D` were kept."""
        if self._largest_DG is not None:
            self._estimator.observe(self._largest_DG, accepted_D, lengths_D)

    def record(self, decoding: Sequence[Running], outputs: Sequence[StepOutput], verified: int, seconds: float) -> None:
        """A step is over in which nobody read a prompt: what it brought, `outputs[i]` to request i, and how long it took."""
        able = self._able
        if self._speculation is None or not able or not self._speculation.measures:
            return
        if any(decoding[i].keeps_proposal for i in able):
            return
        tokens = sum(len(output.events) for output in outputs) if self._budget else len(decoding)
        self._speculation.record(len(decoding), self._budget > 0, verified, tokens, seconds)

    def disturb(self) -> None:
        """A step is over in which somebody read a prompt: what it took is no measure, and neither is what the next take."""
        self._tell()
        if self._speculation is not None:
            self._speculation.disturb()

    def forget(self, row: int) -> None:
        """The request of this row is gone."""
        self._tell()
        self._quiet = 0
        if self._speculation is not None:
            self._speculation.forget(np.array([row]))

    def most(self, request: Running) -> int:
        """Drafted tokens of this request that may be of use."""
        return self.gamma if request.keeps_proposal else min(self.gamma, request.limit - request.made - 1)

    def _tell(self) -> None:
        if self._untold and self._speculation is not None:
            self._speculation.rest(self._decoding, self._listening, self._untold)
            self._untold = 0

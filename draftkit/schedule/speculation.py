"""Whether the drafter runs in a step, and for how many tokens: the one answer that the engine and the simulator share.

Two judges must agree. The *prediction* is `planner.budget_from` of the survivals of the step before. The *account*
compares what drafting steps really brought with what they really took, at the same load:

    gain of a step = tokens / R - seconds / seconds of a step without drafting      (unit: steps without drafting)

of all requests that decode: those that do not draft wait for the others.

Drafting goes on in trials. A trial begins with LOOK drafting steps, so that survivals are known, and ends when the
prediction is against it, when a request joins, or when it has lost what the account allows (`account.py`): what earlier trials
gained, or a credit, 16 steps to begin with and half a percent of all steps without drafting. Both also pay for listening, and
for the first steps behind a trial, which take longer and count as lost by it. Without either there is no trial. Behind a
trial that gained the next one follows at once; behind one that lost x steps after FIRST_REST * x^2, twice as many behind each
further one. Requests differ in what a drafter is worth to them: one that joins gets a trial at once while there is something
in the fund, or half of the credit.

Both judges look at earlier steps only, so the target's law is kept.

Shapes: R requests that draft, S slots, G = gamma drafted positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from draftkit.schedule.account import ALLOWANCE, RECENT, Account, Costs
from draftkit.schedule.history import SurvivalHistory
from draftkit.schedule.planner import admit, budget_from, plan_verification
from draftkit.schedule.step_rate import Floats, Ints, StepRate

LISTENING, LISTENING_EACH = 30e-6, 5e-6  # seconds of a step, and for each request: keeping what the drafter misses
KEPT = 32.0  # of what a trial gained, so much may be lost again before it ends
LOOK = 1  # drafting steps at the beginning of a trial, whatever is predicted: afterwards its survivals are known
FIRST_REST, LONGEST_REST = 32, 1024  # steps, behind a trial that lost one; at most
MOST_DOUBLINGS = 16  # of a rest, however many trials lost one behind the other
HOPELESS_REST = 8192  # where not even luck would make drafting pay
LONG_REST = 128  # what is read during such a rest will hardly be drafted from
MEASURE_EVERY, FIRST_MEASURE = 1024, 16  # drafting steps after which steps without are measured
SETTLED, SURE = 12, 24  # in a row, then one counts: behind drafting or a prompt they take up to twice as long (caches)
MARGIN = 1.05  # drafting must promise this much over plain decoding; the best of many noisy estimates promises too much


@dataclass(slots=True)
class _Load:
    """What is known of one load (numbers of requests of the same magnitude), and the trial that goes on there."""

    listening_cost: float  # in steps without drafting
    costs: Costs = field(default_factory=Costs)
    account: Account = field(default_factory=Account)
    unmeasured: int = MEASURE_EVERY - FIRST_MEASURE  # drafting steps since one without was measured
    gain: float = 0.0  # of the present trial
    drafted: int = 0  # drafting steps of the present trial
    resting: int = 0  # steps until the next trial
    hopeless: bool = False  # the next trial was put off, because not even luck would make it pay
    lost: float = 0.0  # by the last trial, and by the steps behind it, which took longer
    failures: int = 0  # trials that lost, one behind the other
    listened: bool = False  # in the last step, in which nobody drafted

    def drafts(self) -> None:
        """The drafter runs in the step that was decided."""
        self.drafted, self.unmeasured = self.drafted + 1, self.unmeasured + 1

    def rests(self, settled: bool, listening: bool, steps: int = 1) -> None:
        """It does not, in so many; whether the steps before were such ones, and whether any request listens, should it come to
        that."""
        self.listened = listening and not self.deaf
        self.account.rest(steps)
        if self.listened:
            self.account.book(-self.listening_cost * steps)
        if settled:
            self.unmeasured = 0

    def gains(self, steps: float) -> None:
        """A step that drafted brought so much more than it cost. The trial ends when it has lost what it may."""
        self.gain = min(self.gain + steps, KEPT)
        if self.gain < -self.account.may_lose and self.drafted:
            self.stop()

    def stop(self) -> None:
        """The trial is over."""
        self.account.book(self.gain)
        self.lost, self.gain, self.drafted, self.hopeless = -self.gain, 0.0, 0, False
        self.failures = self.failures + 1 if self.lost > 0 else 0
        self._put_off()

    def leaves_cold(self, steps: float, behind: int) -> None:
        """The step `behind` the last one that drafted (1: the next one) took so much longer, which is the trial's cost, too."""
        if self.drafted:  # it goes on: this step was put in to be measured
            self.gain -= steps
            return
        self.account.book(-steps)
        self.lost += steps
        self.failures = max(self.failures, int(self.lost > 0))
        self._put_off(behind)

    def _put_off(self, since: int = 0) -> None:
        """The next trial, so many steps behind the last one; what costs little may soon be tried again."""
        if self.failures:
            doubled = FIRST_REST * 2 ** min(self.failures - 1, MOST_DOUBLINGS)
            rest = int(min(doubled * self.lost**2, LONGEST_REST))
            self.resting = max(rest - since, 0)

    def join(self) -> None:
        """A request is new here: what was learned of others does not say whether drafting pays for it."""
        if self.drafted:
            self.stop()
        if self.open:
            self.resting = self.failures = 0

    @property
    def open(self) -> bool:
        """Whether a request that joins gets a trial at once."""
        return not self.hopeless and self.account.generous

    @property
    def deaf(self) -> bool:
        """Nothing will be drafted for long, whoever joins; so the drafter need not even listen. A credit that listening alone
        would soon use up is left to grow."""
        return not self.open and (self.resting >= LONG_REST or self.account.credit < ALLOWANCE / 4)


class Speculation:
    """Asked for a budget at the beginning of each step; told what became of it at the end.

    `prior_G` as in `SurvivalHistory`. Slots are numbers below `slots` that requests keep.
    """

    def __init__(self, slots: int, gamma: int, step_rate: StepRate, prior_G: Floats | None = None) -> None:
        self.step_rate = step_rate
        self._history = SurvivalHistory(slots, gamma, prior_G)
        self._loads: dict[int, _Load] = {}
        self._last: _Load | None = None
        self._drafted: _Load | None = None  # where a step drafted last
        self._others = 0  # requests of the step that was decided last that do not draft
        self._looking = False  # in that step
        self._idle = self._calm = 0  # steps since one that drafted, since one that read a prompt, at any load: caches are one
        self._met: set[int] = set()  # slots whose requests were there before

    def budget(self, slots_R: Sequence[int] | Ints, others: int = 0) -> int:
        """Drafted tokens that this step's pass should hold, all requests together; 0: the drafter rests. `others` requests
        decode as well and cannot draft."""
        load = self._last = self._load(len(slots_R) + others)
        self._others, self._calm = others, self._calm + 1
        if not self._met.issuperset(slots_R):
            self._met.update(slots_R)
            load.join()
        if load.resting:
            load.resting -= 1
            budget = 0
        else:
            budget = self._decide(load, slots_R)
        if budget:
            self._idle, self._drafted = 0, load
            load.drafts()
        else:
            self._history.rest()
            self._rests(load, listening=True, steps=1)
        return budget

    @property
    def sure_rest(self) -> int:
        """For so many steps the budget will be 0 and `record` of no use, if no request comes or goes; see `rest`."""
        last = self._last
        if last is None or self._idle <= SURE:
            return 0
        return max(last.resting - RECENT, last.account.empty_for - RECENT, 0)

    def rest(self, requests: int, listening: bool, steps: int = 1) -> None:
        """So many of these steps have come, or ones in which none of the requests can draft, because none was listening."""
        load = self._last = self._load(requests)
        self._calm += steps
        load.resting = max(load.resting - steps, 0)
        self._rests(load, listening, steps)

    def lengths(self, survival_RG: Floats, budget: int) -> Ints:
        """Drafted tokens to verify of each request, [R], in the step for which `budget` was the answer, by the survivals of
        its proposals. A step that only looks what the drafter promises goes by Algorithm 1: it verifies what promises to
        pay now, were it nothing, while the budget knows older survivals or those of others."""
        if budget and self._looking:
            return plan_verification(survival_RG, self.step_rate, self._others)
        return admit(survival_RG, budget)

    def rests_long(self, requests: int) -> bool:
        """While so many requests decode the drafter will rest for long, whoever joins."""
        load = self._load(requests)
        return not load.drafted and load.deaf

    def looks(self, requests: int) -> bool:
        """Whether one that joins, and makes them so many, gets a trial at once."""
        return self._load(requests).open

    @property
    def measures(self) -> bool:
        """Whether `record` has a use for the step that was decided last: not in a rest that has long to go."""
        return self._last is None or self._last.resting < RECENT or self._idle <= SURE

    def push(self, slots_R: Ints, survival_RG: Floats) -> None:
        """The survivals of this step's proposals."""
        self._history.push(slots_R, survival_RG)

    def forget(self, slots_R: Ints) -> None:
        """The requests of these slots are gone."""
        self._history.forget(slots_R)
        self._met.difference_update(slots_R)

    def disturb(self) -> None:
        """A step is over that read a prompt, too."""
        self._calm = 0

    def record(self, requests: int, drafting: bool, verified: int, tokens: int, seconds: float) -> None:
        """A step is over: requests that decoded, whether some drafted, drafted tokens verified, tokens gained by all, and
        the seconds that it took. Steps that did other things as well are left out."""
        load, passes = self._load(requests), self.step_rate.pass_table(requests + verified)
        plain = float(passes[requests])
        if not drafting:
            self._record_plain(load, requests, seconds / plain / (1 + load.listening_cost * load.listened))  # that was charged
            return
        predicted = float(passes[requests + verified]) + self.step_rate.drafter_seconds(requests - self._others)
        if load.drafted > 1:  # the first one finds nothing in the caches
            load.costs.measure_drafting(seconds / predicted)
        load.gains(tokens / requests - load.costs.of_drafting(seconds / predicted, predicted / plain))

    def _record_plain(self, load: _Load, requests: int, ratio: float) -> None:
        if self._idle < SETTLED:  # what drafting does to the steps behind it is its cost, too
            steps = load.costs.of_plain(ratio)
            if steps is not None and self._drafted is not None:
                self._drafted.leaves_cold(min(max(steps - 1, 0), 1), self._idle)
        elif self._calm * requests >= SETTLED:  # a prompt among many changes little
            load.costs.measure_plain(ratio, again=SETTLED < self._idle <= SURE)  # of the first of a rest the last one counts

    def _load(self, requests: int) -> _Load:
        key = requests.bit_length()
        if key not in self._loads:
            plain = float(self.step_rate.pass_table(requests)[requests])
            self._loads[key] = _Load((LISTENING + LISTENING_EACH * requests) / plain)
        return self._loads[key]

    def _rests(self, load: _Load, listening: bool, steps: int) -> None:
        self._idle += steps
        load.rests(self._idle >= SETTLED, listening, steps)

    def _decide(self, load: _Load, slots_R: Sequence[int] | Ints) -> int:
        if load.unmeasured >= MEASURE_EVERY or (not load.drafted and not load.account.may_lose):
            return 0
        worth = MARGIN * load.costs.dearness
        if not load.drafted and not load.hopeless:
            hopeful_RG = self._history.hopeful(len(slots_R))
            if not budget_from(hopeful_RG, self.step_rate, worth, self._others):
                load.resting, load.hopeless = HOPELESS_REST, True
                return 0
        stale_RG = self._history.stale(np.asarray(slots_R))
        self._looking = load.drafted < LOOK
        if self._looking or self._idle:  # the step before was spent on measuring
            return budget_from(stale_RG, self.step_rate, 0.0, self._others)
        budget = budget_from(stale_RG, self.step_rate, worth, self._others)
        if not budget:
            load.stop()
        return budget

"""Whether the drafter runs in a step, and for how many tokens: the one answer that the engine and the simulator share.

Two judges must agree. The *prediction* is `planner.budget_from` of the survivals of the step before. The *account*
compares what drafting steps really brought with what they really took, at the same load:

    gain of a step = tokens / R - seconds / seconds of a step without drafting      (unit: steps without drafting)

of all requests that decode: those that do not draft wait for the others.

Drafting goes on in trials. A trial begins with LOOK drafting steps, so that survivals are known, and ends when the
prediction is against it, when a request joins, or when it has lost what it may. It may lose the credit, which is ALLOWANCE
to begin with and grows by TAX with every step without drafting, or the fund, which is SPENT of what trials gain and pays
first; both also pay for listening, and for the first steps behind a trial, which take longer. Without either there is no
trial. Behind a trial that gained the next one follows at once; behind one that lost, after SHORT_REST steps for each that it
lost while all since a request joined have gained together, else after FIRST_REST for each, twice as many behind each further
one; losses below one step count as their squares. Requests differ in what a drafter is worth to them: one that joins gets a
trial at once while there is a fund, or half of the credit. So whatever the drafter is like and whatever the prediction says,
at each load no speculation would have been ahead by at most KEPT and ALLOWANCE and TAX of the steps.

Both judges look at earlier steps only, so the target's law is kept.

Shapes: R requests that draft, S slots, G = gamma drafted positions.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from draftkit.schedule.history import SurvivalHistory
from draftkit.schedule.planner import admit, budget_from, plan_verification
from draftkit.schedule.step_rate import Floats, Ints, StepRate

ALLOWANCE = 16.0  # steps without drafting that trials may lose from the start
TAX = 0.005  # and for each step without drafting that has passed
LISTENING = 0.05  # of a step without drafting: keeping, and reading at last, what the drafter missed (2 to 7 hundredths seen)
SPENT = 0.5  # and of what trials gain
KEPT = 32.0  # in the fund at most; of what a trial gained, so much may be lost again before it ends
LOOK = 1  # drafting steps at the beginning of a trial, whatever is predicted: afterwards its survivals are known
FIRST_REST, LONGEST_REST = 64, 1024  # steps: for each that was lost; at most
SHORT_REST = 8  # for each that was lost, where trials have gained together
HOPELESS_REST = 8192  # where not even luck would make drafting pay
LONG_REST = 128  # what is read during such a rest will hardly be drafted from
MEASURE_EVERY, FIRST_MEASURE = 1024, 16  # drafting steps after which steps without are measured
SETTLED, SURE = 12, 24  # in a row, then one counts: behind drafting or a prompt they take up to twice as long (caches)
RECENT = 9  # steps of each kind that count
AS_SAID = 3  # drafting steps that are taken to have cost what the step rate says, before any was measured
MOST = 2.0  # times the usual cost that a single drafting step is taken to have had at most: others use the machine, too
MARGIN = 1.05  # drafting must promise this much over plain decoding; the best of many noisy estimates promises too much


@dataclass(slots=True)
class _Load:
    """What is known of one load (numbers of requests of the same magnitude). Gains are in steps without drafting."""

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # measured seconds over predicted ones
    drafting: deque[float] = field(default_factory=lambda: deque([1.0] * AS_SAID, maxlen=RECENT))  # the same, over `plain`
    unmeasured: int = MEASURE_EVERY - FIRST_MEASURE  # drafting steps since one without was measured
    gain: float = 0.0  # of the present trial
    drafted: int = 0  # drafting steps of the present trial
    resting: int = 0  # steps until the next trial
    hopeless: bool = False  # the next trial was put off, because not even luck would make it pay
    rest: int = FIRST_REST  # steps of the next rest for each that the trial loses
    earned: float = 0.0  # by all trials since a request joined
    fund: float = 0.0  # of what trials gained, for further ones to lose
    credit: float = ALLOWANCE  # what they may lose without one

    @property
    def dearness(self) -> float:
        """By how much drafting steps are dearer, beside steps without, than the step rate says; a median, so that
        disturbances do not count."""
        return median(self.drafting)

    def measure(self, ratio: float) -> None:
        """Measured seconds of a step that drafted over predicted ones, held against the last steps without, since a machine
        that others use may be half as fast a minute later; the first of a trial, which finds nothing in the caches, does not
        count."""
        if self.plain and self.drafted > 1:
            self.drafting.append(ratio / median(self.plain))

    def drafts(self) -> None:
        """The drafter runs in the step that was decided."""
        self.drafted, self.unmeasured = self.drafted + 1, self.unmeasured + 1

    def rests(self, settled: bool, listening: bool) -> None:
        """It does not; whether the steps before were such ones, and whether any request listens, should it come to that."""
        listened = listening and not self.deaf
        self.credit = min(self.credit + TAX, ALLOWANCE)
        if listened:
            self.pay(LISTENING)
        if settled:
            self.unmeasured = 0

    def stop(self) -> None:
        """The trial is over."""
        self.earned = min(self.earned + self.gain, KEPT)
        lost = max(-self.gain, 0.0)
        if self.gain > 0:
            self.fund, self.rest = min(self.fund + SPENT * self.gain, KEPT), FIRST_REST
        self.pay(lost)
        weight = lost * min(lost, 1.0)  # what costs little may soon be tried again
        if self.earned > 0:
            self.resting = int(SHORT_REST * weight)
        else:
            self.resting = min(int(self.rest * weight), LONGEST_REST)
            self.rest = min(2 * self.rest, LONGEST_REST)
        self.gain, self.drafted, self.hopeless = 0.0, 0, False

    def pay(self, steps: float) -> None:
        """Out of the fund, then out of the credit."""
        from_fund = min(steps, self.fund)
        self.fund, self.credit = self.fund - from_fund, self.credit - (steps - from_fund)

    def join(self) -> None:
        """A request is new here: what was learned of others does not say whether drafting pays for it."""
        if self.drafted:
            self.stop()
        self.earned = 0.0
        if self.open:
            self.resting, self.rest = 0, FIRST_REST

    @property
    def open(self) -> bool:
        """Whether a request that joins gets a trial at once."""
        return not self.hopeless and (self.fund > 0 or self.credit >= ALLOWANCE / 2)

    @property
    def deaf(self) -> bool:
        """Nothing will be drafted for long, whoever joins; so the drafter need not even listen. A credit that listening alone
        would soon use up is left to grow."""
        return not self.open and (self.resting >= LONG_REST or self.credit < ALLOWANCE / 4)


class Speculation:
    """Asked for a budget at the beginning of each step; told what became of it at the end.

    `prior_G` as in `SurvivalHistory`. Slots are numbers below `slots` that requests keep.
    """

    def __init__(self, slots: int, gamma: int, step_rate: StepRate, prior_G: Floats | None = None) -> None:
        self.step_rate = step_rate
        self._history = SurvivalHistory(slots, gamma, prior_G)
        self._loads: defaultdict[int, _Load] = defaultdict(_Load)
        self._last: _Load | None = None
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
            self._idle = 0
            load.drafts()
        else:
            self._history.rest()
            self._rests(load, listening=True)
        return budget

    @property
    def sure_rest(self) -> int:
        """For so many steps the budget will be 0 and `record` of no use, if no request comes or goes; see `rest`."""
        last = self._last
        return max(last.resting - RECENT, 0) if last is not None and self._idle > SURE else 0

    def rest(self, requests: int, listening: bool) -> None:
        """One of these steps has come, or one in which none of the requests can draft, because none was listening."""
        load = self._last = self._load(requests)
        self._calm += 1
        load.resting = max(load.resting - 1, 0)
        self._rests(load, listening)

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
        load, step_rate = self._load(requests), self.step_rate
        passes = step_rate.pass_table(requests + verified)
        plain = float(passes[requests])
        if not drafting:
            if self._idle >= SETTLED:
                if self._calm * requests >= SETTLED:  # a prompt among many changes little
                    if SETTLED < self._idle <= SURE and load.plain:
                        load.plain.pop()  # of the first steps of a rest the last one counts
                    load.plain.append(seconds / plain)
            elif load.plain:  # what drafting does to the steps behind it is its cost, too
                load.pay(min(max(seconds / (plain * median(load.plain)) - 1, 0), 1))
            return
        predicted = float(passes[requests + verified]) + step_rate.drafter_seconds(requests - self._others)
        load.measure(seconds / predicted)
        usual = load.dearness * predicted / plain
        cost = min(seconds / (plain * median(load.plain)), MOST * usual) if load.plain else usual
        load.gain = min(load.gain + tokens / requests - cost, KEPT)
        if load.gain < -max(load.credit, load.fund, 0.0) and load.drafted:
            load.stop()

    def _load(self, requests: int) -> _Load:
        return self._loads[requests.bit_length()]

    def _rests(self, load: _Load, listening: bool) -> None:
        self._idle += 1
        load.rests(self._idle >= SETTLED, listening)

    def _decide(self, load: _Load, slots_R: Sequence[int] | Ints) -> int:
        if load.unmeasured >= MEASURE_EVERY or (not load.drafted and max(load.credit, load.fund) <= 0):
            return 0
        worth = MARGIN * load.dearness
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

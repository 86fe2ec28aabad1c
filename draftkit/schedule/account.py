"""What drafting has brought and cost at one load. The unit of all gains and costs is a step without drafting.

`Costs` knows by how much steps that draft are dearer than the step rate says, `Account` what trials of drafting may still lose.
`speculation.py` decides by both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

ALLOWANCE = 16.0  # steps without drafting that trials may lose from the start
TAX = 0.005  # and for each step without drafting that has passed
MOST_KEPT = 100.0  # of what trials gained, so much may be lost again
RECENT = 9  # steps of each kind that count
AS_SAID = 3  # drafting steps that are taken to have cost what the step rate says, before any was measured
MOST = 2.0  # times the usual cost that a single drafting step is taken to have had at most: others use the machine, too


@dataclass(slots=True)
class Costs:
    """Measured seconds of steps over those that the step rate predicts, so that its unit and an error in proportion do not
    matter."""

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # steps without drafting
    drafting: deque[float] = field(default_factory=lambda: deque([1.0] * AS_SAID, maxlen=RECENT))  # with, over `plain`

    @property
    def dearness(self) -> float:
        """By how much drafting steps are dearer, beside steps without, than the step rate says; a median, so that
        disturbances do not count."""
        return median(self.drafting)

    def of_plain(self, ratio: float) -> float | None:
        """How many usual steps without drafting one took, measured over predicted seconds; None before any was measured."""
        return ratio / median(self.plain) if self.plain else None

    def of_drafting(self, ratio: float, predicted: float) -> float:
        """The same of a step that drafted and should have taken `predicted` such steps. It is held against the last ones
        without, since a machine that others use may be half as fast a minute later."""
        usual = self.dearness * predicted
        return min(ratio * predicted / median(self.plain), MOST * usual) if self.plain else usual

    def measure_plain(self, ratio: float, again: bool) -> None:
        """A step without drafting, measured over predicted seconds; `again`: it takes the place of the last one."""
        if again and self.plain:
            self.plain.pop()
        self.plain.append(ratio)

    def measure_drafting(self, ratio: float) -> None:
        """A step that drafted, the same."""
        if self.plain:
            self.drafting.append(ratio / median(self.plain))


@dataclass(slots=True)
class Account:
    """What trials may lose: first the fund, which they gained, then the credit, which every step without drafting adds to.

    So whatever the drafter is like, at each load no speculation would have been ahead by at most ALLOWANCE and TAX of the
    steps; counted from any later moment, MOST_KEPT more.
    """

    fund: float = 0.0
    credit: float = ALLOWANCE

    @property
    def may_lose(self) -> float:
        """Steps that a trial may lose before it ends."""
        return max(self.credit, self.fund, 0.0)

    @property
    def generous(self) -> bool:
        """There is enough for a look at every request that joins."""
        return self.fund > 0 or self.credit >= ALLOWANCE / 2

    @property
    def empty_for(self) -> int:
        """For so many steps without drafting it will not be enough for a trial."""
        return int(-self.credit / TAX) if self.may_lose == 0 else 0

    def rest(self, steps: int = 1) -> None:
        """So many steps without drafting have passed."""
        self.credit = min(self.credit + steps * TAX, ALLOWANCE)

    def book(self, gain: float) -> None:
        """A trial ended with this gain, or something was lost."""
        if gain > 0:
            self.fund = min(self.fund + gain, MOST_KEPT)
        else:
            from_fund = min(-gain, self.fund)
            self.fund, self.credit = self.fund - from_fund, self.credit - (-gain - from_fund)

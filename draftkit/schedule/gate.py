"""Whether to draft at a load: two running means of measured tokens per second, with the drafter and without
it.

The better one is used. The other is tried again (a probe) after a pause, which doubles while its probes lose.
A probe goes on until it has lost half a percent of the pause before it; where its first steps lose more, the
next pause is as much longer. A prediction alone does not do: confidences may promise too much, and a step may
cost more than the step rate says.

The gate looks at earlier steps only, so the target distribution is kept (`evaluate/exactness.py` enumerates
it).
"""

from __future__ import annotations

from dataclasses import dataclass

# steps of a probe at least (the first find cold caches), and further ones of each request
SHORTEST, EVIDENCE = 3, 8
MEMORY = 256.0  # steps that count in a running mean
FIRST_PAUSE, LONGEST_PAUSE = 64, 4096  # steps; what a probe lost may ask for a longer one
MOST_LOST = 0.005  # of a pause, by a probe


@dataclass(frozen=True)
class GateState:
    """Whether steps draft at the load of the last one, and the tokens per second of steps with drafts and
    without, as last measured at that load; 0 where that is not known yet."""

    drafting: bool
    with_drafts: float
    without_drafts: float


class _Mean:
    """Tokens per second of the last MEMORY steps or so; `pause` is that before the next probe."""

    def __init__(self) -> None:
        self.tokens = self.seconds = self.steps = 0.0
        self.pause: float = FIRST_PAUSE

    @property
    def rate(self) -> float:
        """Tokens per second; 0 before any step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """One more step."""
        self.fade(MEMORY - 1)
        self.tokens, self.seconds, self.steps = self.tokens + tokens, self.seconds + seconds, self.steps + 1

    def fade(self, most: float) -> None:
        """From here on all that was measured counts as much as `most` steps, or as many as there were."""
        share = min(1.0, most / self.steps) if self.steps else 1.0
        self.tokens, self.seconds, self.steps = share * self.tokens, share * self.seconds, share * self.steps


class _Load:
    """One magnitude of decoding requests; `drafting` says how it begins. The first probe comes as soon as
    that is known."""

    def __init__(self, requests: int, drafting: bool) -> None:
        self.drafting = drafting
        self._least = SHORTEST + EVIDENCE // requests
        self._means = {True: _Mean(), False: _Mean()}
        # since the way that is used was taken; since it was last the better one
        self._steps, self._lost = 0, 0.0
        self._wait, self._may_lose = 0.0, 0.0  # so many steps until the other one is tried; steps

    @property
    def state(self) -> GateState:
        """What is known of both ways."""
        return GateState(self.drafting, self._means[True].rate, self._means[False].rate)

    def record(self, tokens: float, seconds: float) -> None:
        """One more step as `drafting` says."""
        used, other = self._means[self.drafting], self._means[not self.drafting]
        used.add(tokens, seconds)
        self._steps += 1
        if other.tokens:
            # in steps of the other
            self._lost += (seconds * other.rate - tokens) * other.steps / other.tokens
        if self._steps < self._least:
            return
        if used.rate >= other.rate:
            self._lost = 0.0
            if self._steps >= self._wait:
                used.pause = FIRST_PAUSE  # it has been the better one for long
                self._turn(FIRST_PAUSE, may_lose=MOST_LOST * self._wait)
        elif self._lost >= self._may_lose:
            used.pause = max(min(2 * used.pause, LONGEST_PAUSE), self._lost / MOST_LOST)
            self._turn(used.pause, may_lose=0)

    def _turn(self, wait: float, may_lose: float) -> None:
        """Use the other way from now on. What is measured now soon counts more than what was known of it."""
        self.drafting = not self.drafting
        self._means[self.drafting].fade(self._least)
        self._steps, self._lost, self._wait, self._may_lose = 0, 0.0, wait, may_lose


class Gate:
    """Asked before each step, told after it. Loads are numbers of decoding requests of the same power of two;
    one that is new begins as the nearest that is known, the first without drafting."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}
        self._last: int | None = None  # the load of the last step

    @property
    def state(self) -> GateState | None:
        """At the load of the last step; None before one."""
        return self._loads[self._last].state if self._last is not None else None

    def drafts(self, requests: int) -> bool:
        """Whether to draft while so many requests decode."""
        size = requests.bit_length()
        nearest = min(self._loads, key=lambda known: abs(known - size), default=None)
        return nearest is not None and self._loads[nearest].drafting

    def record(self, requests: int, tokens: float, seconds: float) -> None:
        """A step is over that did as the gate said and nothing else (no prompt was read): what it brought and
        how long it took."""
        size = requests.bit_length()
        if size not in self._loads:
            self._loads[size] = _Load(requests, self.drafts(requests))
        self._last = size
        self._loads[size].record(tokens, seconds)

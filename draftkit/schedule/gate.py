"""Whether to draft at a load: two running means of measured tokens per second, with the drafter and without it.

The better one is used. The other is tried again (a probe) after a pause, which doubles while its probes lose, and is at
least so long that a probe costs one percent of the time until the next. A prediction alone does not do: confidences may
promise too much, and a step may cost more than the step rate says.

The gate looks at earlier steps only, so the target distribution is kept (`evaluate/exactness.py` enumerates it).
"""

from __future__ import annotations

PROBE = 8  # steps of a probe at least; it goes on for as long as its mean is the better one
MEMORY = 256.0  # steps that count in a running mean
FIRST_PAUSE, LONGEST_PAUSE = 64, 4096  # steps; what a probe lost may ask for a longer one
MOST_LOST = 0.01  # of the time until the next probe


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
    """One magnitude of decoding requests. It begins with a probe of drafting, then one of not drafting."""

    def __init__(self) -> None:
        self.drafting = True
        self._means = {True: _Mean(), False: _Mean()}
        self._begin(wait=0)

    def record(self, tokens: float, seconds: float) -> None:
        """One more step as `drafting` says."""
        used, other = self._means[self.drafting], self._means[not self.drafting]
        used.add(tokens, seconds)
        self._steps, self._tokens, self._seconds = self._steps + 1, self._tokens + tokens, self._seconds + seconds
        if self._steps < PROBE:
            return
        if used.rate < other.rate:
            lost = (self._seconds * other.rate - self._tokens) * other.steps / other.tokens  # in steps of the other
            used.pause = max(min(2 * used.pause, LONGEST_PAUSE), lost / MOST_LOST)
        elif self._steps >= self._wait:
            used.pause = FIRST_PAUSE  # should the other one win
        else:
            return
        self.drafting = not self.drafting
        other.fade(PROBE)  # a probe counts as much as all that was known before
        self._begin(used.pause)

    def _begin(self, wait: float) -> None:
        """One way is used from now on, for `wait` steps at most before the other is tried."""
        self._wait = wait
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0


class Gate:
    """Asked before each step, told after it. Loads are numbers of decoding requests of the same power of two."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}

    def drafts(self, requests: int) -> bool:
        """Whether to draft while so many requests decode."""
        load = self._loads.get(requests.bit_length())
        return load is None or load.drafting

    def record(self, requests: int, tokens: float, seconds: float) -> None:
        """A step is over that did as the gate said and nothing else (no prompt was read): what it brought and how long it
        took."""
        self._loads.setdefault(requests.bit_length(), _Load()).record(tokens, seconds)

"""What a step costs: seconds of one target pass by tokens in it, and seconds of drafting by requests.

The paper writes SPS(B), steps per second of a pass of B tokens; 1 / SPS(B) is what is kept here, because the
drafter's time adds to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Literal

import numpy as np
import numpy.typing as npt

from draftkit.errors import ScheduleError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
MOST = 10**9  # tokens, requests or seconds; nothing that anybody measures has more
Interpolation = Literal["linear", "staircase"]


@dataclass(frozen=True)
class StepRate:
    """Measured points, ascending: `pass_seconds[i]` for a target pass of `tokens[i]` tokens (all requests
    together), `draft_seconds[i]` for drafting for `draft_requests[i]` requests.

    Between the points: "linear", or "staircase" when a pass is padded up to the next measured size. Below the
    first point the first value holds. Above the last one seconds grow in proportion to tokens, as if no
    further token were free; `assumption` says so. Raises ScheduleError for a table that is empty, not
    ascending or not positive.
    """

    tokens: tuple[int, ...]
    pass_seconds: tuple[float, ...]
    draft_requests: tuple[int, ...] = (1,)
    draft_seconds: tuple[float, ...] = (0.0,)
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        _check_points("step rate", "tokens", self.tokens, self.pass_seconds, zero_allowed=False)
        _check_points("drafter cost", "requests", self.draft_requests, self.draft_seconds, zero_allowed=True)
        if self.interpolation not in ("linear", "staircase"):
            raise ScheduleError(
                f"step rate: interpolation {self.interpolation!r}; allowed is linear or staircase"
            )

    def step_seconds(self, requests: int, tokens_N: Ints) -> Floats:
        """Seconds of a step that drafts for `requests` requests and passes tokens_N tokens through the
        target, [N]."""
        return self.target_seconds(tokens_N) + self.drafter_seconds(requests)

    def target_seconds(self, tokens_N: Ints) -> Floats:
        """Seconds of one target pass, [N]."""
        return self._look_up(self.tokens, self.pass_seconds, tokens_N)

    def drafter_seconds(self, requests: int) -> float:
        """Seconds of drafting for so many requests."""
        return float(self._look_up(self.draft_requests, self.draft_seconds, np.array([requests]))[0])

    def assumption(self, most_tokens: int) -> str | None:
        """What is assumed for passes of up to `most_tokens` tokens that were not measured; None when all
        were."""
        if most_tokens <= self.tokens[-1]:
            return None
        return (
            f"the step rate was measured up to {self.tokens[-1]} tokens per pass; above that (here up to "
            f"{most_tokens}) "
            "time is taken to grow in proportion to tokens"
        )

    def _look_up(self, x: tuple[int, ...], y: tuple[float, ...], wanted_N: Ints) -> Floats:
        if self.interpolation == "linear":
            found_N = np.interp(wanted_N, x, y)
        else:
            found_N = np.asarray(y)[np.minimum(np.searchsorted(x, wanted_N), len(x) - 1)]
        return np.where(wanted_N > x[-1], y[-1] * (wanted_N / x[-1]), found_N)


def _check_points(what: str, axis: str, x: tuple[int, ...], y: tuple[float, ...], zero_allowed: bool) -> None:
    if not x or len(x) != len(y):
        raise ScheduleError(
            f"{what}: {len(x)} points of {axis} and {len(y)} values; give as many of each, at least one"
        )
    numbers = all(isinstance(v, Integral) and not isinstance(v, bool) for v in x)
    if not numbers or not 1 <= x[0] <= x[-1] <= MOST or any(b <= a for a, b in pairwise(x)):
        raise ScheduleError(
            f"{what}: {axis} {list(x)[:8]} must be at least 1 and at most {MOST}, whole and ascending"
        )
    bad = [v for v in y if not isinstance(v, Real) or not 0 <= v <= MOST or (v == 0 and not zero_allowed)]
    if bad:
        raise ScheduleError(
            f"{what}: {bad[0]} seconds; every value must be finite and positive, measure it again"
        )

"""Faults that only running shows: the drafter as it is, and with one thing changed, along the same answers.

What a sound drafter was trained with is best, so a change that raises the accepted length names a fault.
Changes are tried again after each one that is found: two faults are named one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draftkit.doctor.changes import Trial, trials
from draftkit.doctor.findings import Finding
from draftkit.doctor.pair import Pair
from draftkit.doctor.recorded import Recorded, gain, records_along
from draftkit.errors import DraftkitError
from draftkit.evaluate.metrics import PromptRecord, acceptance_by_position, accepted_length

LEAST_GAIN = 0.05  # of the accepted length, below which a change is no fault that anybody would feel
MOST_FAULTS = 4  # that are looked for one after the other


@dataclass(frozen=True)
class Ran:
    """The drafter as it is given (`first`, empty when it does not load) and with all faults mended."""

    findings: tuple[Finding, ...]
    first: tuple[PromptRecord, ...]
    mended: tuple[PromptRecord, ...]
    mended_pair: Pair


def run_trials(
    pair: Pair,
    recorded: Sequence[Recorded],
    dtype: torch.dtype,
    tick: Callable[[], None] = lambda: None,
) -> Ran:
    """Try all changes; `tick` is called after each."""
    findings: list[Finding] = []
    first = current = _measured(pair, recorded, dtype)
    while len(findings) < MOST_FAULTS:
        best: tuple[float, Trial, tuple[PromptRecord, ...]] | None = None
        for trial in trials(pair):
            after = _promising(trial.pair, recorded, dtype, current)
            tick()
            better = _better(current, after)
            if after and better and (best is None or better > best[0]):
                best = (better, trial, after)
        if best is None:
            break
        _, trial, after = best
        findings.append(Finding(trial.check, trial.what, _cost(current, after), trial.mend))
        pair, current = trial.pair, after
    return Ran(tuple(findings), first, current, pair)


def _measured(pair: Pair, recorded: Sequence[Recorded], dtype: torch.dtype) -> tuple[PromptRecord, ...]:
    """Rounds along all answers; empty when this makes no drafter."""
    try:
        return tuple(records_along(pair.drafter(dtype), recorded))
    except DraftkitError:
        return ()


def _promising(
    pair: Pair, recorded: Sequence[Recorded], dtype: torch.dtype, before: Sequence[PromptRecord]
) -> tuple[PromptRecord, ...]:
    """Rounds along all answers, unless a third of them says that nothing is gained."""
    # a third of each domain, however they take turns
    third = [i for i in range(len(recorded)) if i % 3 == i // 3 % 3]
    first = _measured(pair, [recorded[i] for i in third], dtype)
    if not first or (before and gain([before[i] for i in third], first)[0] <= 0):
        return ()
    return _measured(pair, recorded, dtype)


def _better(before: Sequence[PromptRecord], after: Sequence[PromptRecord]) -> float:
    """Tokens per round that a change brings, 0 when it may be chance. A drafter that did not load drafted
    nothing."""
    if not after:
        return 0.0
    if not before:
        return max(0.0, accepted_length(after).value - 1)
    more, low = gain(before, after)
    return more if low > 0 and more >= LEAST_GAIN * accepted_length(before).value else 0.0


def _cost(before: Sequence[PromptRecord], after: Sequence[PromptRecord]) -> str:
    length = accepted_length(after).value
    if not before:
        return f"it does not load; mended, the accepted length is {length:.2f}"
    was = accepted_length(before).value
    return f"{100 * (1 - was / length):.0f} % of the accepted length, {was:.2f} instead of {length:.2f}"


def acceptance_of(records: Sequence[PromptRecord]) -> list[float]:
    """Conditional acceptance by position; what was never reached counts as the last that was."""
    found: list[float] = []
    for value in acceptance_by_position(records):
        found.append(value if value == value else (found[-1] if found else 0.0))
    return found

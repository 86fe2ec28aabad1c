"""The break-even: from what steps cost on this machine, the accepted length from which drafting pays, and how
many tokens an engine without a planner should draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from draftkit.draft.drafter import Drafter
from draftkit.engine.compiled import compile_models
from draftkit.engine.measure import measure_step_rate
from draftkit.engine.models import build_models
from draftkit.engine.settings import EngineSettings
from draftkit.schedule.step_rate import StepRate
from draftkit.target.transformers import TransformersTarget


@dataclass(frozen=True)
class DraftedTokens:
    """One number of drafted tokens, for one request at a time: the accepted length from which it pays, the
    one that is to be expected, and the speed over decoding without a drafter."""

    drafted: int
    break_even: float
    expected: float
    speed_up: float


def measure_costs(target: TransformersTarget, drafter: Drafter) -> StepRate:
    """Seconds of passes and of drafting for one request, as the engine runs them."""
    models = build_models(target, drafter, EngineSettings(max_running=1))
    compile_models(models)
    assert models.drafter is not None
    return measure_step_rate(models, models.drafter, max_running=1)


def drafted_tokens(
    step_rate: StepRate, acceptance_G: Sequence[float], token_by_token: bool
) -> list[DraftedTokens]:
    """All numbers of drafted tokens, from 1 to gamma. `acceptance_G` is conditional, by position; a drafter
    that drafts `token_by_token` takes its time in proportion."""
    gamma = len(acceptance_G)
    plain = float(step_rate.target_seconds(np.array([1]))[0])
    drafting = step_rate.drafter_seconds(1)
    survival_G, found = np.cumprod(acceptance_G), []
    for count in range(1, gamma + 1):
        seconds = float(step_rate.target_seconds(np.array([count + 1]))[0])
        seconds += drafting * (count / gamma if token_by_token else 1.0)
        expected = 1 + float(survival_G[:count].sum())
        found.append(DraftedTokens(count, seconds / plain, expected, expected * plain / seconds))
    return found


def sentences(found: Sequence[DraftedTokens]) -> list[str]:
    """What the table means."""
    best = max(found, key=lambda one: one.speed_up)
    counts = ", ".join(f"{one.drafted}: {one.break_even:.2f}" for one in found)
    first = f"break-even, one request at a time in draftkit's engine here, by drafted tokens: {counts}"
    if best.speed_up > 1:
        return [
            first,
            f"an engine without a planner should draft {best.drafted}: accepted length {best.expected:.2f}, "
            f"{best.speed_up:.2f} x the speed without a drafter (without other load)",
        ]
    return [
        first,
        f"drafting does not pay here: {best.drafted} drafted tokens would bring {best.expected:.2f} per "
        "round "
        f"and need {best.break_even:.2f} ({best.speed_up:.2f} x); draftkit's planner then does not draft",
    ]

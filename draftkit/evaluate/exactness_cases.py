"""What the proof by enumeration (`exactness.py`) tries: targets, drafters and confidences by table, planners,
and step rates.

Prefixes are nodes of a tree: the root is 0, the child of node n by token t is V n + 1 + t.

Shapes: R requests, V vocabulary, G = gamma drafted positions, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from draftkit.schedule.gate import EVIDENCE, SHORTEST, Gate
from draftkit.schedule.planner import admit, budget_from, plan_verification, survival_of
from draftkit.schedule.step_rate import Floats, Ints, StepRate

LEVELS = 3  # distinct confidences per table


@dataclass(frozen=True)
class Tables:
    """A target, a drafter and a confidence head by table: what each says after every prefix, at every block
    position."""

    vocab: int
    gamma: int
    length: int  # L, tokens of the output that are compared
    target_NV: Floats
    draft_NGV: Floats
    level_NG: Ints  # index into `levels`
    levels: Floats


@dataclass(frozen=True)
class PlannerCase:
    """A planner under test: `lengths(confidence_RG, budget) -> [R]`; `budget(stale confidence_RG, tokens)` is
    asked with the confidences of `lag` rounds earlier and, where it `counts` them, the tokens that this round
    brought all requests together; ones and 0 before there are any. Without a budget, lag is 0 and budget 0.
    """

    name: str
    lengths: Callable[[Floats, int], Ints]
    budget: Callable[[Floats, int], int] | None = None
    lag: int = 0
    counts: bool = False


def planner_cases(step_rate: StepRate, gamma: int, lag: int) -> list[PlannerCase]:
    """Every planner of `schedule.planner`, and the budget with the gate before it, as the engine asks for
    it."""

    def cut(confidence_RG: Floats, budget: int) -> Ints:
        return admit(survival_of(confidence_RG), budget)

    def budget(stale_RG: Floats, _: int) -> int:
        return budget_from(survival_of(stale_RG), step_rate)

    return [
        PlannerCase("fixed", lambda c, _: np.full(len(c), gamma)),
        PlannerCase("algorithm-1", lambda c, _: plan_verification(survival_of(c), step_rate)),
        PlannerCase("budget", cut, budget, lag),
        PlannerCase("gate", cut, lambda c, tokens: gated_budget(c, tokens, step_rate), 1, counts=True),
    ]


def gated_budget(stale_RG: Floats, tokens: int, step_rate: StepRate) -> int:
    """The budget after a step that drafted with these confidences and brought so many tokens; 0 where the
    gate then says that the next one does not draft. What it knew before lets that step decide: at two tokens
    per request drafting goes on."""
    requests, gate = len(stale_RG), Gate()
    least = SHORTEST + EVIDENCE // requests
    for _ in range(least):  # without the drafter
        gate.record(requests, 0.75 * requests, 1.0)
    for _ in range(least - 1):  # with it
        gate.record(requests, 0.0, 0.1)
    gate.record(requests, tokens or 2 * requests, 1.0)
    return budget_from(survival_of(stale_RG), step_rate) if gate.drafts(requests) else 0


def same_step_search(step_rate: StepRate) -> PlannerCase:
    """The planner that must fail: the best budget by the survivals of the very step that it cuts."""

    def lengths(confidence_RG: Floats, _: int) -> Ints:
        survival_RG = survival_of(confidence_RG)
        return admit(survival_RG, budget_from(survival_RG, step_rate))

    return PlannerCase("same-step search", lengths)


def random_tables(vocab: int, gamma: int, length: int, rng: np.random.Generator) -> Tables:
    """Random sharp distributions after every prefix; confidences of a few levels, so that ties, 0 and 1
    occur."""
    nodes = first_of_depth(vocab, length + gamma)
    levels = rng.uniform(size=LEVELS)
    levels[rng.uniform(size=LEVELS) < 0.15] = 0.0
    levels[rng.uniform(size=LEVELS) < 0.15] = 1.0
    return Tables(
        vocab,
        gamma,
        length,
        _softmax(rng.normal(size=(nodes, vocab)) * 2),
        _softmax(rng.normal(size=(nodes, gamma, vocab)) * 2),
        rng.integers(0, LEVELS, (nodes, gamma)),
        levels,
    )


def random_step_rate(most_tokens: int, rng: np.random.Generator) -> StepRate:
    """A jagged one: any step may be dear, some are free."""
    seconds = (
        1 + (rng.exponential(0.7, most_tokens) * (rng.uniform(size=most_tokens) < 0.5)).cumsum()
    ).tolist()
    return StepRate(tuple(range(1, most_tokens + 1)), tuple(seconds))


def appendix_a() -> tuple[Tables, StepRate]:
    """The paper's example of a search that biases: p = (0.7, 0.3), q = (0.5, 0.5), c_1 = 0.8, c_2 = 0.9 after
    the first token and 0 after the second; 1, 0.5 and 0.45 steps per second for passes of 1, 2 and 3 tokens.
    """
    nodes, gamma = first_of_depth(2, 4), 2
    level_NG = np.zeros((nodes, gamma), np.int64)
    level_NG[1, 1], level_NG[2, 1] = 1, 2
    target_NV, draft_NGV = np.tile([0.7, 0.3], (nodes, 1)), np.full((nodes, gamma, 2), 0.5)
    tables = Tables(2, gamma, 1, target_NV, draft_NGV, level_NG, np.array([0.8, 0.9, 0.0]))
    return tables, StepRate((1, 2, 3), (1.0, 1 / 0.5, 1 / 0.45))


def first_of_depth(vocab: int, depth: int) -> int:
    """The first node of a depth, and the number of nodes above it."""
    return sum(vocab**d for d in range(depth))


def _softmax(logits: Floats) -> Floats:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)

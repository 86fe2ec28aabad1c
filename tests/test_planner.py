"""Plans: they equal a plain reading of Algorithm 1, are contiguous, deterministic and never look where they
must not."""

from __future__ import annotations

import numpy as np
import pytest

from draftkit.schedule.planner import (
    BudgetPlanner,
    admit,
    budget_from,
    plan_verification,
    survival_of,
)
from draftkit.schedule.step_rate import StepRate

JAGGED = StepRate((1, 8, 9, 32, 33, 64, 200), (1.0, 1.1, 1.6, 1.7, 2.6, 2.8, 9.0), (1, 64), (0.1, 0.4))


def random_survival(seed: int, requests: int = 9, gamma: int = 5, coarse: bool = False) -> np.ndarray:
    confidence = np.random.default_rng(seed).uniform(0.2, 1.0, (requests, gamma))
    return survival_of(confidence.round(1) if coarse else confidence)


def algorithm_1(survival: np.ndarray, rate: StepRate) -> list[int]:
    """The paper's text, word by word."""
    requests, gamma = survival.shape
    candidates = [
        (-survival[r, j], j, r) for r in range(requests) for j in range(gamma) if survival[r, j] > 0
    ]
    lengths, tokens, expected = [0] * requests, requests, float(requests)
    best = expected / float(rate.step_seconds(requests, np.array([tokens]))[0])
    for minus, j, r in sorted(candidates):
        tokens, expected = tokens + 1, expected - minus
        theta = expected / float(rate.step_seconds(requests, np.array([tokens]))[0])
        if theta <= best:
            break
        best, lengths[r] = theta, j + 1
    return lengths


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "with ties"])
def test_a_plan_is_algorithm_1_as_it_is_written(coarse: bool) -> None:
    seen = set()
    for seed in range(200):
        survival = random_survival(seed, requests=1 + seed % 12, coarse=coarse)
        lengths = plan_verification(survival, JAGGED)
        assert lengths.tolist() == algorithm_1(survival, JAGGED)
        seen.add(int(lengths.sum()))
    assert len(seen) > 5


def test_the_budget_is_the_best_of_all() -> None:
    for seed in range(100):
        survival = random_survival(seed, requests=1 + seed % 12)
        requests, ordered = len(survival), np.sort(survival.ravel())[::-1]
        rates = [
            (requests + ordered[:k].sum()) / float(JAGGED.step_seconds(requests, np.array([requests + k]))[0])
            for k in range(survival.size + 1)
        ]
        assert budget_from(survival, JAGGED) == int(np.argmax(rates))


def test_requests_that_do_not_draft_count_as_ones_whose_drafts_are_worth_nothing() -> None:
    """Each is a token of the pass and gets one; but the drafter's time is that of those who draft."""
    free = StepRate(JAGGED.tokens, JAGGED.pass_seconds, interpolation=JAGGED.interpolation)
    budgets = set()
    for seed in range(100):
        survival, others = random_survival(seed, requests=1 + seed % 12), seed % 7
        among = np.concatenate([survival, np.zeros((others, survival.shape[1]))])
        budgets.add(budget_from(survival, free, others=others))
        assert budget_from(survival, free, others=others) == budget_from(among, free)
        assert (
            plan_verification(survival, free, others).tolist()
            == plan_verification(among, free)[: len(survival)].tolist()
        )
    assert len(budgets) > 5
    paid = StepRate((1, 100), (1.0, 1.0), (1, 2), (0.3, 90.0))
    assert budget_from(np.full((1, 4), 0.9), paid, others=1) == 4


def test_the_time_of_drafting_is_spent_when_lengths_are_planned() -> None:
    costly = StepRate((1, 100), (1.0, 1.1), (1,), (50.0,))
    survival = np.full((1, 4), 0.9)
    assert budget_from(survival, costly) == 4
    assert plan_verification(survival, costly).tolist() == [4]


def test_budgets_see_survivals_of_the_step_before_only() -> None:
    """One token of two is worth its place, and which it is was said one step earlier."""
    planner, slots = BudgetPlanner(3, 1, StepRate((1, 2, 3, 4), (1.0, 1.0, 1.1, 1.3))), np.array([0, 2])

    def lengths(*survivals: float) -> list[int]:
        return planner.plan(slots[: len(survivals)], np.array(survivals)[:, None]).tolist()

    assert lengths(0.1, 0.3) == [1, 1], "nothing is known: every chance is given"
    assert lengths(0.9, 0.8) == [1, 0], "one only, by what the step before said"
    assert lengths(0.1, 0.3) == [1, 1]
    planner.forget(np.array([0, 2]))
    assert planner._mean_G == pytest.approx((0.2 + 0.85 + 0.2) / 3), (
        "requests without a past are like all others"
    )


def test_admission_takes_the_largest_survivals_and_keeps_prefixes_contiguous() -> None:
    survival = np.array([[0.9, 0.5, 0.4], [0.8, 0.7, 0.6], [0.0, 0.0, 0.0]])
    assert [admit(survival, k).tolist() for k in (0, 1, 3, 5, 99)] == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 2, 0],
        [2, 3, 0],
        [3, 3, 0],
    ]


def test_ties_go_by_position_then_request() -> None:
    equal = np.ones((3, 3))
    assert admit(equal, 4).tolist() == [2, 1, 1]
    assert admit(equal[::-1].copy(), 4).tolist() == [2, 1, 1]


def test_survivals_never_rise_along_a_request_even_where_floats_round() -> None:
    survival = survival_of(np.random.default_rng(0).choice([1.0, 1 - 1e-16, 1 - 2e-16, 5e-324], (500, 7)))
    assert (np.diff(survival, axis=1) <= 0).all()


def test_a_confidence_that_is_no_number_is_zero() -> None:
    survival = survival_of(np.array([[0.5, np.nan, 0.9], [1.5, -0.5, np.nan]]))
    assert survival.tolist() == [[0.5, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_no_requests_and_no_positions_give_empty_plans() -> None:
    for survival in (np.zeros((0, 3)), np.zeros((2, 0))):
        for lengths in (plan_verification(survival, JAGGED), admit(survival, 5)):
            assert lengths.tolist() == [0] * len(survival)
        assert budget_from(survival, JAGGED) == 0

"""The proof by enumeration: it passes for every rule with every planner, and it finds what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from draftkit.cli import app
from draftkit.evaluate.exactness import DEVIATION_ALLOWED, _Plans, deviation, output_distribution, prove
from draftkit.evaluate.exactness_cases import (
    PlannerCase,
    appendix_a,
    planner_cases,
    random_step_rate,
    random_tables,
    same_step_search,
)
from draftkit.ops.verify import BLOCK_RULE, RULES, TOKEN_RULE, Rule


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("requests", [1, 2])
def test_every_rule_with_every_planner_keeps_the_joint_distribution(requests: int, gamma: int) -> None:
    findings = prove(requests, gamma, tables=3, seed=gamma)
    planners = ("fixed", "algorithm-1", "budget", "gate")
    assert {(f.rule, f.planner) for f in findings} == {
        (rule, planner) for rule in RULES for planner in planners
    }
    assert max(f.deviation for f in findings) < DEVIATION_ALLOWED


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_same_step_search_biases_as_in_appendix_a(rule: Rule) -> None:
    tables, step_rate = appendix_a()
    biased = output_distribution(rule, same_step_search(step_rate), [tables], rounds=1)
    np.testing.assert_allclose(biased, [0.85, 0.15], atol=1e-12)
    for case in planner_cases(step_rate, tables.gamma, lag=1):
        np.testing.assert_allclose(
            output_distribution(rule, case, [tables], rounds=1), [0.7, 0.3], atol=1e-12
        )


@pytest.mark.parametrize("requests", [1, 2])
def test_the_same_step_search_is_found_out_on_random_tables(requests: int) -> None:
    rng, worst = np.random.default_rng(3), 0.0
    for _ in range(30):
        tables = [random_tables(3, 2, 3, rng) for _ in range(requests)]
        case = same_step_search(random_step_rate(3 * requests, rng))
        worst = max(worst, deviation(output_distribution(TOKEN_RULE, case, tables, rounds=2), tables))
    assert worst > 1e-3


def test_a_plan_that_looks_at_the_next_requests_future_is_found_out() -> None:
    """A budget that grows with the LAST survival of any request decides about the tokens that this survival
    reflects."""

    def lengths(confidence_RG: np.ndarray, _: int) -> np.ndarray:
        return np.full(len(confidence_RG), 2 if confidence_RG[:, -1].max() > 0.5 else 0)

    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(6):
        tables = [random_tables(3, 2, 3, rng) for _ in range(2)]
        worst = max(
            worst,
            deviation(
                output_distribution(BLOCK_RULE, PlannerCase("wrong", lengths), tables, rounds=1), tables
            ),
        )
    assert worst > 1e-3


def test_a_wrong_rule_is_found_out() -> None:
    """Taking the bonus row in place of the residual, or the residual of the other rule, is seen with any
    planner."""
    no_residual = Rule(
        "wrong", lambda ratios: 1e300 * TOKEN_RULE.weights(ratios), TOKEN_RULE.length_distribution
    )
    mixed = Rule(
        "wrong",
        TOKEN_RULE.weights,
        lambda ratios, weights, surplus, lengths: BLOCK_RULE.length_distribution(
            ratios, BLOCK_RULE.weights(ratios), surplus, lengths
        ),
    )
    for wrong in (no_residual, mixed):
        rng, worst = np.random.default_rng(0), {}
        for _ in range(15):
            tables = [random_tables(3, 2, 3, rng)]
            for case in planner_cases(random_step_rate(3, rng), gamma=2, lag=2):
                found = deviation(output_distribution(wrong, case, tables, rounds=2), tables)
                worst[case.name] = max(found, worst.get(case.name, 0.0))
        assert min(worst.values()) > 1e-4, worst


def test_the_proof_is_about_plans_that_differ() -> None:
    """Over a few random tables every planner but the fixed one gives most of the lengths 0..gamma."""
    rng, seen = np.random.default_rng(0), {}
    for _ in range(8):
        tables = [random_tables(3, 3, 3, rng) for _ in range(2)]
        for case in planner_cases(random_step_rate(8, rng), gamma=3, lag=1):
            plans = _Plans(case, tables)
            for history in ((), ((0, 2),), ((5, 4),)):
                seen.setdefault(case.name, set()).update(np.unique(plans.lengths(history)).tolist())
    assert seen.pop("fixed") == {3}
    assert all(lengths == {0, 1, 2, 3} for lengths in seen.values()), seen


def test_the_command_prints_the_table_and_fails_when_the_distribution_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = CliRunner().invoke(app, ["verify-lossless", "--gamma", "2", "--tables", "1"])
    assert done.exit_code == 0
    assert "algorithm-1" in done.output
    assert "0.85" in done.output
    done = CliRunner().invoke(app, ["verify-lossless", "--gamma", "1", "--tables", "1", "--json"])
    found = json.loads(done.stdout)
    assert len(found["findings"]) == 16
    assert found["largest_deviation"] < DEVIATION_ALLOWED
    broken = Rule("token", BLOCK_RULE.weights, TOKEN_RULE.length_distribution)
    monkeypatch.setitem(RULES, "token", broken)
    assert CliRunner().invoke(app, ["verify-lossless", "--gamma", "2", "--tables", "2"]).exit_code == 1

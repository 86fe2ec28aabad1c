"""The estimator without a confidence head learns what the data say, from verified positions only."""

from __future__ import annotations

import numpy as np

from draftkit.schedule.estimator import AcceptanceEstimator
from draftkit.schedule.temperature_scaling import auc, expected_error

SLOPE, INTERCEPTS = 0.6, np.array([1.0, 0.0, -1.0])


def step(rng: np.random.Generator, requests: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Largest draft probabilities, and how many tokens would be kept if all were verified."""
    largest = rng.uniform(0.05, 0.99, (requests, 3))
    truth = 1 / (1 + np.exp(-(SLOPE * np.log(largest / (1 - largest)) + INTERCEPTS)))
    return largest, (rng.uniform(size=truth.shape) < truth).cumprod(-1).sum(-1)


def trained(cut: bool) -> AcceptanceEstimator:
    rng, estimator = np.random.default_rng(0), AcceptanceEstimator(3)
    for _ in range(300):
        largest, kept = step(rng)
        verified = (estimator.confidence(largest) > 0.3).cumprod(-1).sum(-1) if cut else np.full(len(kept), 3)
        estimator.observe(largest, np.minimum(kept, verified), verified)
    return estimator


def test_the_distribution_of_the_data_is_learned_also_when_a_plan_cuts_proposals() -> None:
    for cut in (False, True):
        weights = trained(cut).weights
        np.testing.assert_allclose(weights, [SLOPE, *INTERCEPTS], atol=0.25)


def test_the_estimate_is_calibrated_and_ranks_on_new_data() -> None:
    estimator, rng = trained(cut=True), np.random.default_rng(9)
    largest, kept = step(rng, 20_000)
    survival = estimator.confidence(largest).cumprod(-1)
    outcome = (np.arange(3) < kept[:, None]).astype(float)
    for k in range(3):
        assert expected_error(survival[:, k], outcome[:, k]) < 0.02
        assert auc(survival[:, k], outcome[:, k]) > 0.65


def test_before_any_observation_the_confidence_is_the_drafters_own_probability() -> None:
    estimator = AcceptanceEstimator(2)
    np.testing.assert_allclose(estimator.confidence(np.array([[0.3, 0.9]])), [[0.3, 0.9]])
    assert estimator.confidence(np.array([[np.nan, 1.0]]))[0, 0] < 0.001


def test_positions_without_a_verdict_are_not_learned_from() -> None:
    estimator = AcceptanceEstimator(3)
    estimator.observe(np.full((3, 3), 0.5), np.array([0, 2, 1]), np.array([3, 2, 0]))
    assert estimator.seen == 1 + 2 + 0  # a rejection at 1; two kept and none after; nothing verified

"""Sequential Temperature Scaling: how a calibration is fitted, and the measures that say whether it helped.

One temperature per drafted position, from left to right, chosen on a grid so that the expected calibration
error of the running product up to k is smallest while the temperatures before stay as they are.

Shapes: N proposals, G = gamma drafted positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from draftkit.errors import ScheduleError
from draftkit.schedule.calibration import Calibration, logit, sigmoid
from draftkit.schedule.step_rate import Floats

Bools = npt.NDArray[np.bool_]
GRID = np.logspace(-1, 1, 81)
TOLERANCE = 0.001  # errors this close to the smallest differ by chance: the temperature nearest to 1 is taken
BINS = 15


def fit_calibration(confidence_NG: Floats, kept_NG: Floats, usable_NG: Bools) -> Calibration:
    """Sequential Temperature Scaling on outcomes: `kept_NG` is 1 where the whole prefix up to a position was
    kept.

    Only `usable_NG` counts. NaN confidences count as zero. Raises ScheduleError when a position has no
    outcome.
    """
    count_G = usable_NG.sum(0)
    if (count_G == 0).any():
        raise ScheduleError(f"calibration: outcomes per position {count_G.tolist()}; record more prompts")
    logits_NG = logit(np.nan_to_num(confidence_NG))
    raw_NG = sigmoid(logits_NG).cumprod(-1)
    survival_N = np.ones(len(logits_NG))
    temperatures, before, after = [], [], []
    for k in range(logits_NG.shape[1]):
        use_N, kept_N = usable_NG[:, k], kept_NG[usable_NG[:, k], k]
        errors = [expected_error((survival_N * sigmoid(logits_NG[:, k] / t))[use_N], kept_N) for t in GRID]
        best = _mildest(errors)
        survival_N = survival_N * sigmoid(logits_NG[:, k] / best)
        temperatures.append(best)
        before.append(expected_error(raw_NG[use_N, k], kept_N))
        after.append(errors[int(np.flatnonzero(best == GRID)[0])])
    return Calibration(
        tuple(temperatures), num_samples=len(logits_NG), ece_before=tuple(before), ece_after=tuple(after)
    )


def _mildest(errors: list[float]) -> float:
    near = GRID[np.array(errors) <= min(errors) + TOLERANCE]
    return float(near[np.abs(np.log(near)).argmin()])


def expected_error(predicted_N: Floats, kept_N: Floats) -> float:
    """ECE: over 15 equal bins of the prediction, sum of share * |mean prediction - mean outcome|."""
    if not len(predicted_N):
        return float("nan")
    bin_N = np.minimum((predicted_N * BINS).astype(np.int64), BINS - 1)
    predicted_B = np.bincount(bin_N, predicted_N, BINS)
    kept_B = np.bincount(bin_N, kept_N, BINS)
    return float(np.abs(predicted_B - kept_B).sum() / len(predicted_N))


def error_by_chance(predicted_N: Floats, draws: int = 20) -> float:
    """The ECE that so many outcomes show on average when every prediction is exactly right: no estimate gets
    below."""
    rng = np.random.default_rng(0)
    kept = [(rng.uniform(size=len(predicted_N)) < predicted_N).astype(np.float64) for _ in range(draws)]
    return float(np.mean([expected_error(predicted_N, k) for k in kept]))


def brier(predicted_N: Floats, kept_N: Floats) -> float:
    """Mean squared difference of prediction and outcome."""
    return float(np.mean((predicted_N - kept_N) ** 2)) if len(predicted_N) else float("nan")


def auc(predicted_N: Floats, kept_N: Floats) -> float:
    """Area under the ROC curve: the chance that a kept one is predicted higher than one that was not, ties as
    half."""
    kept = kept_N > 0.5
    positives, negatives = int(kept.sum()), int((~kept).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(predicted_N, return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum() - (counts - 1) / 2  # of each distinct value, from 1
    return float((mean_rank[inverse][kept].sum() - positives * (positives + 1) / 2) / (positives * negatives))


@dataclass(frozen=True)
class Quality:
    """ECE, the ECE by chance alone, AUC and Brier score of the survival estimate, per position [G]."""

    ece: tuple[float, ...]
    chance: tuple[float, ...]
    auc: tuple[float, ...]
    brier: tuple[float, ...]


def quality_of(confidence_NG: Floats, kept_NG: Floats, usable_NG: Bools) -> Quality:
    """Measures of the running product of confidences against the fate of the prefix; NaN counts as zero."""
    survival_NG = np.nan_to_num(confidence_NG).cumprod(-1)
    pairs = [(survival_NG[use, k], kept_NG[use, k]) for k, use in enumerate(usable_NG.T)]
    return Quality(
        tuple(expected_error(*p) for p in pairs),
        tuple(error_by_chance(predicted) for predicted, _ in pairs),
        tuple(auc(*p) for p in pairs),
        tuple(brier(*p) for p in pairs),
    )

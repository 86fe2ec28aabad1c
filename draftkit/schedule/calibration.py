"""Calibrated confidence: Sequential Temperature Scaling, and the measures that say whether it helped.

One temperature T_k per drafted position, from left to right: sigmoid(logit(c_k) / T_k), chosen on a grid so
that the expected calibration error of the running product up to k is smallest while the temperatures before
stay as they are.

Shapes: N proposals, G = gamma drafted positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from draftkit.artefact import DIGEST, is_intact, read_json, sealed
from draftkit.errors import ScheduleError, reason
from draftkit.output import write_text
from draftkit.schedule.step_rate import Floats

Bools = npt.NDArray[np.bool_]
GRID = np.logspace(-1, 1, 81)
TOLERANCE = 0.001  # errors this close to the smallest differ by chance: the temperature nearest to 1 is taken
BINS = 15
EDGE = 1e-7  # confidences are kept this far from 0 and 1, so that their logits are finite


@dataclass(frozen=True)
class Calibration:
    """One temperature per drafted position, and what they belong to. Raises ScheduleError unless all are
    above 0."""

    temperatures: tuple[float, ...]
    drafter_fingerprint: str = ""
    dataset: str = ""
    num_samples: int = 0
    ece_before: tuple[float, ...] = ()
    ece_after: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperatures or not all(np.isfinite(t) and t > 0 for t in self.temperatures):
            raise ScheduleError(
                f"calibration: temperatures {list(self.temperatures)}; give one above 0 per position"
            )

    def check_gamma(self, gamma: int) -> None:
        """Raise ScheduleError when the drafter has another number of positions."""
        if len(self.temperatures) != gamma:
            raise ScheduleError(
                f"calibration of {len(self.temperatures)} positions, the drafter has {gamma}; calibrate "
                f"this drafter"
            )

    def check_drafter(self, fingerprint: str) -> None:
        """Raise ScheduleError when it was made for another drafter; one that names none passes."""
        if self.drafter_fingerprint and self.drafter_fingerprint != fingerprint:
            raise ScheduleError(
                f"calibration of another drafter (made for {self.drafter_fingerprint[:12]}, given "
                f"{fingerprint[:12]}); "
                "calibrate this one"
            )

    def apply(self, confidence_RG: Floats) -> Floats:
        """Calibrated confidences [R, G]; NaN stays NaN. Raises ScheduleError for another number of
        positions."""
        self.check_gamma(np.shape(confidence_RG)[-1])
        return _sigmoid(_logit(confidence_RG) / np.array(self.temperatures))


def fit_calibration(confidence_NG: Floats, kept_NG: Floats, usable_NG: Bools) -> Calibration:
    """Sequential Temperature Scaling on outcomes: `kept_NG` is 1 where the whole prefix up to a position was
    kept.

    Only `usable_NG` counts. NaN confidences count as zero. Raises ScheduleError when a position has no
    outcome.
    """
    count_G = usable_NG.sum(0)
    if (count_G == 0).any():
        raise ScheduleError(f"calibration: outcomes per position {count_G.tolist()}; record more prompts")
    logits_NG = _logit(np.nan_to_num(confidence_NG))
    raw_NG = _sigmoid(logits_NG).cumprod(-1)
    survival_N = np.ones(len(logits_NG))
    temperatures, before, after = [], [], []
    for k in range(logits_NG.shape[1]):
        use_N, kept_N = usable_NG[:, k], kept_NG[usable_NG[:, k], k]
        errors = [expected_error((survival_N * _sigmoid(logits_NG[:, k] / t))[use_N], kept_N) for t in GRID]
        best = _mildest(errors)
        survival_N = survival_N * _sigmoid(logits_NG[:, k] / best)
        temperatures.append(best)
        before.append(expected_error(raw_NG[use_N, k], kept_N))
        after.append(errors[int(np.flatnonzero(best == GRID)[0])])
    return Calibration(
        tuple(temperatures), num_samples=len(logits_NG), ece_before=tuple(before), ece_after=tuple(after)
    )


def _mildest(errors: list[float]) -> float:
    near = GRID[np.array(errors) <= min(errors) + TOLERANCE]
    return float(near[np.abs(np.log(near)).argmin()])


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write JSON that SGLang's `--speculative-dspark-confidence-sts-path` reads: {"temperatures": [...],
    ...}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(sealed(vars(calibration)), indent=1) + "\n")


def load_calibration(path: Path, gamma: int, drafter_fingerprint: str) -> Calibration:
    """Read the calibration of a drafter of gamma positions. Raises ScheduleError for another one, and for no
    calibration."""
    try:
        content = read_json(path, ScheduleError, "is no calibration")
        if DIGEST in content and not is_intact(content):
            raise ScheduleError(
                "is damaged (another digest than its own); make it again with draftkit calibrate"
            )
        fields = {k: v for k, v in content.items() if k in Calibration.__annotations__}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        calibration = Calibration(**known)
        calibration.check_gamma(gamma)
        calibration.check_drafter(drafter_fingerprint)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ScheduleError(
            f"{path}: is no calibration ({reason(error)}); make one with draftkit calibrate"
        ) from None
    return calibration


# --- measures


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


def _logit(confidence: Floats) -> Floats:
    clipped = np.asarray(confidence, np.float64).clip(EDGE, 1 - EDGE)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))

"""Calibrated confidence: one temperature T_k per drafted position, sigmoid(logit(c_k) / T_k), and its file.

Shapes: R requests, G = gamma drafted positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from draftkit.artefact import read_json, sealed, was_changed
from draftkit.errors import ScheduleError, reason
from draftkit.output import write_text
from draftkit.schedule.step_rate import Floats

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
        if not isinstance(self.drafter_fingerprint, str):
            raise ScheduleError(
                f"calibration: drafter_fingerprint is {self.drafter_fingerprint!r:.40}, must be text"
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
        return sigmoid(logit(confidence_RG) / np.array(self.temperatures))


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write JSON that SGLang's `--speculative-dspark-confidence-sts-path` reads: {"temperatures": [...],
    ...}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(sealed(vars(calibration)), indent=1) + "\n")


def load_calibration(path: Path, gamma: int, drafter_fingerprint: str) -> Calibration:
    """Read the calibration of a drafter of gamma positions. Raises ScheduleError for another one, and for no
    calibration."""
    calibration = read_calibration(path)
    try:
        calibration.check_gamma(gamma)
        calibration.check_drafter(drafter_fingerprint)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    return calibration


def read_calibration(path: Path) -> Calibration:
    """Read a calibration, whatever drafter it is for. Raises ScheduleError for another file."""
    try:
        content = read_json(path, ScheduleError, "is no calibration")
        if was_changed(content):
            raise ScheduleError(
                "is damaged (another digest than its own); make it again with draftkit calibrate"
            )
        fields = {k: v for k, v in content.items() if k in Calibration.__annotations__}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return Calibration(**known)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ScheduleError(
            f"{path}: is no calibration ({reason(error)}); make one with draftkit calibrate"
        ) from None


def logit(confidence: Floats, edge: float = EDGE) -> Floats:
    """Log odds; confidences are kept `edge` away from 0 and 1."""
    clipped = np.asarray(confidence, np.float64).clip(edge, 1 - edge)
    return np.log(clipped) - np.log1p(-clipped)


def sigmoid(logits: Floats) -> Floats:
    """Probabilities of log odds."""
    return 1 / (1 + np.exp(-logits))

"""What the engine counts: a mutable tally inside, frozen snapshots outside. No torch.

Shapes: R requests, G = gamma drafted positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from draftkit.schedule.gate import GateState

_BINS = 10


@dataclass(frozen=True)
class EngineMetrics:
    """Gauges of now and counters since the start.

    `rounds` are counted per request. Of the `drafted` tokens `verified` went through the target (the budget),
    `accepted` were kept and `wasted` not. Seconds: in the drafter's passes, in the target's, in the rest of
    the steps. `calibration_error` compares (calibrated) confidences with what verification found, in ten bins
    weighted by size, over the positions that were reached; None before there is one. `gate` says whether
    drafting pays at the present load; None before that is known, and where lengths are fixed.
    """

    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_total: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    wasted: int = 0
    accepted_per_position: tuple[int, ...] = ()
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0
    preemptions: int = 0
    calibration_error: float | None = None
    gate: GateState | None = None


class Tally:
    """The running sums of `EngineMetrics`."""

    def __init__(self, gamma: int) -> None:
        self.rounds = self.drafted = self.verified = self.accepted = 0
        self.per_position = np.zeros(gamma, np.int64)
        self.draft_seconds = self.verify_seconds = self.other_seconds = 0.0
        self.calibration_error: float | None = None
        self._bins = np.zeros((3, _BINS))  # positions, sum of confidences, accepted

    def add_drafts(self, drafted: int, lengths_R: np.ndarray, accepted_R: np.ndarray) -> None:
        """One step's proposals: `drafted` tokens in all, of which `lengths_R` per request were verified."""
        self.drafted += drafted
        self.verified += int(lengths_R.sum())
        self.accepted += int(accepted_R.sum())
        place_G = np.arange(len(self.per_position))
        self.per_position += (place_G < accepted_R[:, None]).sum(0)

    def add_confidences(self, said_RG: np.ndarray, lengths_R: np.ndarray, accepted_R: np.ndarray) -> None:
        """One step's confidences, compared with the verdict where verification came that far."""
        lengths_R1, accepted_R1 = lengths_R[:, None], accepted_R[:, None]
        place_G = np.arange(said_RG.shape[1])
        seen_RG = place_G < np.minimum(accepted_R1 + 1, lengths_R1)
        # no number is no confidence
        found, kept = np.nan_to_num(said_RG[seen_RG]), (place_G < accepted_R1)[seen_RG]
        bins = np.minimum((found * _BINS).astype(np.int64), _BINS - 1)
        for sums, weights in zip(self._bins, (None, found, kept), strict=True):
            sums += np.bincount(bins, weights, minlength=_BINS)
        positions, said, accepted = self._bins
        if positions.sum():
            self.calibration_error = float(np.abs(said - accepted).sum() / positions.sum())

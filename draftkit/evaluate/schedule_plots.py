"""Pictures of scheduling: reliability, throughput against speed, budget against load, threshold sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from draftkit.output import save_figure
from draftkit.schedule.calibration import BINS, Bools
from draftkit.schedule.simulate import Outcome
from draftkit.schedule.step_rate import Floats

SCHEDULED = ("algorithm 1", "budget", "oracle")


def plot_reliability(
    before_NG: Floats, after_NG: Floats, kept_NG: Floats, usable_NG: Bools, path: Path
) -> None:
    """Predicted against observed survival, one panel per position, raw and calibrated (the paper's Figure
    6)."""
    from matplotlib.figure import Figure

    gamma = kept_NG.shape[1]
    figure = Figure(figsize=(2.6 * gamma, 3.0), layout="constrained")
    for k, axis in enumerate(figure.subplots(1, gamma, sharey=True, squeeze=False)[0]):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for label, confidence_NG in (("raw", before_NG), ("calibrated", after_NG)):
            survival_N = np.nan_to_num(confidence_NG[usable_NG[:, k]]).cumprod(-1)[:, k]
            bin_N = np.minimum((survival_N * BINS).astype(int), BINS - 1)
            count_B = np.bincount(bin_N, minlength=BINS)
            full = count_B >= 10  # fewer say nothing
            predicted_B = np.bincount(bin_N, survival_N, BINS)[full] / count_B[full]
            observed_B = np.bincount(bin_N, kept_NG[usable_NG[:, k], k], BINS)[full] / count_B[full]
            axis.plot(predicted_B, observed_B, marker="o", markersize=3, label=label)
        axis.set(title=f"position {k + 1}", xlabel="predicted survival", xlim=(0, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
        if k == 0:
            axis.set_ylabel("kept")
            axis.legend()
    save_figure(figure, path, 110)


def plot_simulation(outcomes: Sequence[Outcome], path: Path) -> None:
    """Throughput against per-user speed, and the verification budget against load (the paper's Figures 7 and
    8)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, arm in enumerate(dict.fromkeys(o.arm for o in outcomes)):
        own = [o for o in outcomes if o.arm == arm]
        colour = {"no speculation": "black", "oracle": "silver"}.get(arm, f"C{index % 10}")
        style = "-" if arm in SCHEDULED else ("--" if arm in ("no speculation", "one token") else ":")
        line = {"linestyle": style, "marker": "o", "markersize": 3, "label": arm, "color": colour}
        left.plot([o.user_speed for o in own], [o.throughput for o in own], **line)
        if arm in SCHEDULED or arm.startswith("fixed"):
            right.plot([o.running_mean for o in own], [o.verified_mean for o in own], **line)
    left.set(
        xlabel="tokens per second of one user (median)",
        ylabel="tokens per second of all",
        xscale="log",
        yscale="log",
    )
    right.set(
        xlabel="running requests (mean)", ylabel="drafted tokens verified per request and step", xscale="log"
    )
    right.set_ylim(0, None)
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    save_figure(figure, path)


def plot_thresholds(
    thresholds: Sequence[float], by_domain: Mapping[str, tuple[Floats, Floats]], path: Path
) -> None:
    """Acceptance rate of verified tokens and tokens per step over the static threshold (the paper's Figure
    5)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for domain, (rate, tokens) in by_domain.items():
        left.plot(thresholds, rate, marker="o", label=domain)
        right.plot(thresholds, tokens, marker="o", label=domain)
    left.set(xlabel="confidence threshold", ylabel="accepted share of verified tokens", ylim=(0, 1))
    right.set(xlabel="confidence threshold", ylabel="tokens per step", ylim=(1, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)

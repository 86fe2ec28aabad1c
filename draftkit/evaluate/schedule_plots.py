"""Pictures of scheduling: reliability, throughput against speed, budget against load, threshold sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from draftkit.output import save_figure
from draftkit.schedule.simulate import Outcome
from draftkit.schedule.step_rate import Floats
from draftkit.schedule.temperature_scaling import BINS, Bools


def plot_reliability(
    before_NG: Floats, after_NG: Floats, kept_NG: Floats, usable_NG: Bools, path: Path
) -> None:
    """Predicted against observed survival with its 95 % interval, one panel per position, raw and calibrated
    (the paper's Figure 6)."""
    from matplotlib.figure import Figure

    gamma = kept_NG.shape[1]
    columns = min(gamma, 4)
    rows = -(-gamma // columns)
    figure = Figure(figsize=(2.8 * columns, 2.9 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for k, axes in enumerate(panels):
        if k >= gamma:
            axes.set_visible(False)
            continue
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="right predictions")
        for label, style, confidence_NG in (
            ("as they are", "o-", before_NG),
            ("calibrated", "D--", after_NG),
        ):
            predicted_B, observed_B, count_B = _reliability(confidence_NG, kept_NG, usable_NG, k)
            half_B = 1.96 * np.sqrt(observed_B * (1 - observed_B) / count_B)
            axes.errorbar(
                predicted_B, observed_B, half_B, fmt=style, mfc="none", ms=5, elinewidth=0.8, label=label
            )
        tokens = "first token" if k == 0 else f"first {k + 1} tokens"
        axes.set(title=f"{tokens} ({int(usable_NG[:, k].sum()):,} proposals)", xlim=(0, 1), ylim=(0, 1))
        axes.tick_params(labelbottom=k + columns >= gamma)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    figure.supxlabel("predicted chance that all of them are kept", fontsize=10)
    figure.supylabel("share that was kept", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    save_figure(figure, path, 110)


def _reliability(
    confidence_NG: Floats, kept_NG: Floats, usable_NG: Bools, k: int
) -> tuple[Floats, Floats, Floats]:
    """Mean prediction, share kept and count of each of BINS bins that holds ten proposals or more: fewer say
    nothing."""
    survival_N = np.nan_to_num(confidence_NG[usable_NG[:, k]]).cumprod(-1)[:, k]
    bin_N = np.minimum((survival_N * BINS).astype(int), BINS - 1)
    count_B = np.bincount(bin_N, minlength=BINS).astype(float)
    full = count_B >= 10
    predicted_B = np.bincount(bin_N, survival_N, BINS)[full] / count_B[full]
    observed_B = np.bincount(bin_N, kept_NG[usable_NG[:, k], k], BINS)[full] / count_B[full]
    return predicted_B, observed_B, count_B[full]


def plot_simulation(outcomes: Sequence[Outcome], path: Path) -> None:
    """Speed over that of the target alone, and how much is verified, over the load: what the engine plans
    beside the best fixed length at each load and an oracle (the paper's Figures 7 and 8)."""
    from matplotlib.figure import Figure

    loads = list(dict.fromkeys((o.concurrency, o.rate) for o in outcomes))
    by_load = {load: {o.arm: o for o in outcomes if (o.concurrency, o.rate) == load} for load in loads}
    shown: dict[str, tuple[str, str, Callable[[Mapping[str, Outcome]], Outcome]]] = {
        "planned, as draftkit serve does": ("C0", "o-", lambda arms: arms["budget"]),
        "best fixed length of this load": ("C1", "s--", _best_fixed),
        "oracle: knows what will be kept": ("grey", "^:", lambda arms: arms["oracle"]),
    }
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, (colour, style, choose) in shown.items():
        chosen = [(choose(by_load[load]), by_load[load]["no speculation"]) for load in loads]
        speed_ups = [o.throughput / plain.throughput for o, plain in chosen]
        left.plot(range(len(loads)), speed_ups, style, color=colour, label=label)
        right.plot(range(len(loads)), [o.verified_mean for o, _ in chosen], style, color=colour)
    left.axhline(1, color="black", linewidth=0.8, label="target alone")
    left.set(ylabel="speed over the target alone", title="tokens per second of all users")
    right.set(ylabel="tokens per request and step", title="drafted tokens that are verified")
    for axes in (left, right):
        names = [f"{c}" if rate is None else f"{rate:g}/s" for c, rate in loads]
        axes.set_xticks(range(len(loads)), names)
        axes.set_xlabel("users at once" if loads[0][1] is None else "arrivals per second")
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save_figure(figure, path)


def _best_fixed(arms: Mapping[str, Outcome]) -> Outcome:
    fixed = [o for name, o in arms.items() if name.startswith("fixed") or name == "one token"]
    return max(fixed, key=lambda o: o.throughput)

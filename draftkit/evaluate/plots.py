"""Pictures of an evaluation (matplotlib is imported only when one is drawn)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from draftkit.evaluate.run import EvalResult
from draftkit.output import save_figure


def plot_acceptance(results: Sequence[EvalResult], path: Path) -> None:
    """Conditional acceptance by position, one panel per result and one line per domain (the paper's Figure
    2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(results), 3.6), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, result in zip(axes, results, strict=True):
        for domain, values in result.acceptance.items():
            style = {"color": "black", "linestyle": "--"} if domain == "all" else {"marker": "o"}
            axis.plot(range(1, len(values) + 1), values, label=domain, **style)
        temperature = result.settings["sampling"]["temperature"]
        axis.set(title=f"T = {temperature:g}", xlabel="position in the block", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accepted, given those before")
    axes[-1].legend(loc="lower left")
    save_figure(figure, path)

"""Pictures of an evaluation (matplotlib is imported only when one is drawn)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from draftkit.evaluate.metrics import acceptance_interval
from draftkit.evaluate.run import EvalResult
from draftkit.output import save_figure


def plot_acceptance(results: Sequence[EvalResult], path: Path) -> None:
    """Conditional acceptance by position with its 95 % interval over prompts, one panel per result and one
    line per domain (the paper's Figure 2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(results), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        for domain, values in result.acceptance.items():
            place = range(1, len(values) + 1)
            records = [r for r in result.records if domain in ("all", r.domain)]
            low, high = acceptance_interval(records)
            style = {"color": "black", "linestyle": "--"} if domain == "all" else {"marker": "o"}
            [line] = axes.plot(place, values, label=f"{domain} ({len(records)} prompts)", **style)
            axes.fill_between(place, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        temperature = result.settings["sampling"]["temperature"]
        title = f"{result.settings['target']}, temperature {temperature:g}"
        axes.set(title=title, xlabel="position of the drafted token", ylim=(0, 1.02))
        axes.set_xticks(range(1, len(result.acceptance["all"]) + 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share accepted, where all before it were")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    save_figure(figure, path)

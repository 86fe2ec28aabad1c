"""From the records of arms and seeds to a table with intervals and a plot of acceptance by position.

The accepted length of a domain is tokens per round over all seeds and prompts; macro is the mean over
domains. Intervals are 95 % bootstrap percentiles over prompts: a prompt is drawn with all its seeds, and for
a ratio with both arms. Shapes: S seeds, P prompts of a domain, R bootstrap samples, G = gamma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

SAMPLES = 4000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """An arm's name and, per seed, the records of `draftkit evaluate`."""

    name: str
    records: tuple[list[dict[str, Any]], ...]

    def counts(self, domain: str) -> tuple[Floats, Floats]:
        """Tokens emitted and rounds, both [S, P], prompts in the same order for every arm."""
        rows = [
            sorted((r for r in seed if r["domain"] == domain), key=lambda r: str(r["prompt_id"]))
            for seed in self.records
        ]
        emitted = np.array([[r["emitted"] for r in row] for row in rows], float)
        return emitted, np.array([[r["rounds"] for r in row] for row in rows], float)

    def acceptance(self, domain: str | None) -> list[float | None]:
        """Accepted over tried by position [G], all seeds together; None where a position was never
        reached."""
        chosen = [r for seed in self.records for r in seed if domain is None or r["domain"] == domain]
        tried, accepted = (np.sum([r[key] for r in chosen], axis=0) for key in ("tried", "accepted"))
        return [float(a / t) if t else None for a, t in zip(accepted, tried, strict=True)]


def drawn_lengths(arm: Arm, domains: Sequence[str]) -> dict[str, Floats]:
    """Bootstrap samples of the accepted length [R] by domain and "macro"; all arms draw the same prompts."""
    lengths = {}
    for number, domain in enumerate(domains):
        emitted_SP, rounds_SP = arm.counts(domain)
        prompts = emitted_SP.shape[1]
        drawn_RP = np.random.default_rng(number).integers(0, prompts, (SAMPLES, prompts))
        lengths[domain] = emitted_SP.sum(0)[drawn_RP].sum(1) / rounds_SP.sum(0)[drawn_RP].sum(1)
    return lengths | {"macro": np.mean(list(lengths.values()), axis=0)}


def seed_lengths(arm: Arm, domains: Sequence[str]) -> dict[str, Floats]:
    """Accepted length of each seed [S] by domain and "macro"."""
    lengths = {d: arm.counts(d)[0].sum(1) / arm.counts(d)[1].sum(1) for d in domains}
    return lengths | {"macro": np.mean(list(lengths.values()), axis=0)}


def pooled_lengths(arm: Arm, domains: Sequence[str]) -> dict[str, float]:
    """Accepted length of all seeds together by domain and "macro"."""
    lengths = {d: float(arm.counts(d)[0].sum() / arm.counts(d)[1].sum()) for d in domains}
    return lengths | {"macro": float(np.mean(list(lengths.values())))}


def interval(value: float, drawn: Floats) -> dict[str, float]:
    """The estimate with its 95 % percentile interval."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": round(value, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def build_report(arms: Sequence[Arm], baselines: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Accepted lengths, ratios to each baseline, and acceptance by position, as one JSON object."""
    domains = list(dict.fromkeys(r["domain"] for r in arms[0].records[0]))
    prompts = [r["prompt_id"] for r in arms[0].records[0]]
    for arm in arms:
        if any([r["prompt_id"] for r in seed] != prompts for seed in arm.records):
            raise SystemExit(
                f"error: {arm.name} was measured on other prompts; remove its results and run again"
            )
    drawn = {a.name: drawn_lengths(a, domains) for a in arms}
    pooled = {a.name: pooled_lengths(a, domains) for a in arms}
    per_seed = {a.name: seed_lengths(a, domains) for a in arms}
    rows = {}
    for arm in arms:
        name = arm.name
        ratios = {}
        for base in baselines:
            by_seed = per_seed[name]["macro"] / per_seed[base]["macro"]
            ratio = interval(
                pooled[name]["macro"] / pooled[base]["macro"], drawn[name]["macro"] / drawn[base]["macro"]
            )
            ratios[base] = ratio | {"seeds": [round(float(x), 4) for x in by_seed]}
        rows[name] = {
            "accepted_len": {d: interval(pooled[name][d], drawn[name][d]) for d in (*domains, "macro")},
            "macro_by_seed": [round(float(x), 4) for x in per_seed[name]["macro"]],
            "ratio": ratios,
            "acceptance": {d: arm.acceptance(d) for d in domains} | {"all": arm.acceptance(None)},
        }
    environment = {"prompts": len(prompts), "domains": domains}
    return {"environment": environment, "settings": settings, "baselines": list(baselines), "arms": rows}


def print_table(report: dict[str, Any]) -> None:
    """One row per arm: accepted length by domain, macro with interval and spread over seeds, ratios with
    intervals."""
    domains = report["environment"]["domains"]
    table = Table(title=f"Accepted length at T = 1, {report['environment']['prompts']} prompts")
    for column in ("arm", *domains, "macro [95 %]", "seeds", *(f"/ {b} [95 %]" for b in report["baselines"])):
        table.add_column(column)
    for name, row in report["arms"].items():
        lengths = row["accepted_len"]
        seeds = row["macro_by_seed"]
        table.add_row(
            name,
            *(f"{lengths[d]['value']:.3f}" for d in domains),
            _shown(lengths["macro"]),
            f"{min(seeds):.3f}..{max(seeds):.3f}",
            *(_shown(row["ratio"][b]) for b in report["baselines"]),
        )
    Console(width=160).print(table)


_NAMES = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "EAGLE-3"}


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Conditional acceptance by position, one panel per domain and one for all, one line per arm (Figure
    2)."""
    from matplotlib.figure import Figure

    panels = [*report["environment"]["domains"], "all"]
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for name, row in report["arms"].items():
            values = [float("nan") if v is None else v for v in row["acceptance"][panel]]
            axis.plot(range(1, len(values) + 1), values, marker="o", label=_NAMES.get(name, name))
        axis.set(title=panel, xlabel="position of the draft", ylim=(0, 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of drafts accepted")
    figure.suptitle(
        "How often the target accepts the draft at each position, where all drafts before it were accepted "
        f"(T = 1, {report['environment']['prompts']} prompts)",
        fontsize="medium",
    )
    axes[-1].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)


def _shown(value: dict[str, Any]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

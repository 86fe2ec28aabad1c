"""Terminal tables of calibration, step rate and simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from draftkit.schedule.simulate import Outcome
from draftkit.schedule.step_rate_table import StepRateTable
from draftkit.schedule.temperature_scaling import Quality

UNSTEADY = 0.2  # quartiles so far apart, as a share of the median


def print_calibration(
    temperatures: Sequence[float], before: Quality, after: Quality, rows: int, missing: int
) -> None:
    """One row per position: temperature, and each measure raw and calibrated on held-out proposals."""
    table = Table(title=f"survival of the prefix up to a position, {rows} held-out proposals")
    for column in ("position", "T", "ECE", "then", "chance", "AUC", "then", "Brier", "then"):
        table.add_column(column, justify="right", no_wrap=True)
    columns = [
        (before.ece, _percent),
        (after.ece, _percent),
        (after.chance, _percent),
        (before.auc, _thousandths),
        (after.auc, _thousandths),
        (before.brier, _thousandths),
        (after.brier, _thousandths),
    ]
    for k, temperature in enumerate(temperatures):
        table.add_row(str(k + 1), f"{temperature:.2f}", *(show(values[k]) for values, show in columns))
    table.add_section()
    table.add_row("mean", "", *(show(sum(values) / len(values)) for values, show in columns))
    table.caption = (
        "then: calibrated; chance: the ECE that so many outcomes show when every prediction is right"
    )
    Console().print(table)
    if missing:
        Console().print(f"{missing} confidences were no numbers and count as zero")


def calibration_notes(raw: Quality, calibrated: Quality, prompts: int, refused: bool) -> list[str]:
    """What a reader should know before using a calibration: was it taken, and do the data suffice."""
    before, after, chance = (float(np.nanmean(v)) for v in (raw.ece, calibrated.ece, raw.chance))
    found = []
    if refused:
        found.append(
            f"not taken: on held-out prompts it would make the error larger ({100 * before:.1f} to "
            f"{100 * after:.1f} %). The file leaves the confidences as they are (temperatures of 1)."
        )
    if chance > before / 2:
        found.append(
            f"too little data: on {prompts} prompts even right confidences would show an error of "
            f"{100 * chance:.1f} % by chance. Give more prompts (-p) to know more."
        )
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _thousandths(value: float) -> str:
    return f"{value:.3f}"


def print_step_rate(table: StepRateTable) -> None:
    """Milliseconds per pass by tokens and context, and the drafter's by requests."""
    console, measured = Console(), table.measured
    grid = Table(
        title=f"{measured.target} on {measured.device}, {measured.threads} threads, {measured.clock}, "
        f"medians of "
        f"{measured.repeats} (quartiles typically {100 * measured.spread:.0f} % apart)"
    )
    grid.add_column("tokens in the pass", justify="right")
    for context in table.contexts:
        grid.add_column(f"ms, context {context}", justify="right")
    for i, tokens in enumerate(table.tokens):
        grid.add_row(str(tokens), *(f"{1e3 * row[i]:.2f}" for row in table.pass_seconds))
    console.print(grid)
    costs = zip(table.draft_requests, table.draft_seconds, strict=True)
    if measured.spread > UNSTEADY:
        console.print("the machine was not quiet while this was measured; measure again when it is")
    console.print("drafting, ms by requests: " + ", ".join(f"{r}: {1e3 * s:.2f}" for r, s in costs))


def print_simulation(outcomes: Sequence[Outcome], assumptions: Sequence[str]) -> None:
    """One table per load: every arm beside no speculation."""
    console = Console()
    for load in dict.fromkeys((o.concurrency, o.rate) for o in outcomes):
        own = [o for o in outcomes if (o.concurrency, o.rate) == load]
        plain = own[0]
        arriving = f", {load[1]:g} arrivals per second" if load[1] else ""
        table = Table(
            title=f"at most {load[0]} requests at once{arriving}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for column in (
            "arm",
            "tokens/s",
            "x none",
            "tokens/s per user",
            "verified",
            "accepted length",
            "running",
        ):
            table.add_column(column, justify="right" if column != "arm" else "left", no_wrap=column == "arm")
        for o in own:
            table.add_row(
                o.arm,
                f"{o.throughput:,.1f}",
                f"{o.throughput / plain.throughput:.2f}",
                f"{o.user_speed:.1f}",
                f"{o.verified_mean:.2f}",
                f"{o.accepted_len:.2f}",
                f"{o.running_mean:.1f}",
            )
        console.print(table)
    for sentence in assumptions:
        console.print(f"assumed: {sentence}")

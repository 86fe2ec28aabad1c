"""`draftkit simulate`: ask what drafting would bring at a load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_simulation
from draftkit.commands.numbers import whole_numbers
from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
)
from draftkit.output import as_json, make_folder
from draftkit.progress import doing

EXAMPLE = "Example: draftkit simulate --step-rate balanced --concurrency 1,64 -o simulation"


def command(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder for simulation.png")] = None,
    traces: Annotated[Path | None, typer.Option(help="of draftkit calibrate; none = SmolLM2's pair")] = None,
    step_rate: Annotated[
        str | None,
        typer.Option(help="file, memory-bound, balanced or compute-bound; none = SmolLM2's pair"),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="of draftkit calibrate")] = None,
    concurrency: Annotated[list[str] | None, typer.Option(help="requests at once, as 1,8,64")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Poisson arrivals per second; repeatable")] = None,
    requests: Annotated[int, typer.Option(help="per load", min=1)] = 1000,
    seed: int = 0,
    json_output: JsonOption = False,
) -> None:
    """Ask what drafting would bring at a load. Recorded proposals are replayed on a step-rate table, arm by
    arm."""
    if out is not None:
        make_folder(out)
    check_simulation(traces, step_rate, calibration)
    from dataclasses import asdict

    with doing(LIBRARIES):
        from draftkit import schedule_stages
        from draftkit.evaluate.schedule_report import print_simulation
        from draftkit.schedule.simulate import Load

    source = schedule_stages.open_simulation(traces, step_rate, calibration)
    levels = whole_numbers("--concurrency", concurrency) or ([256] if rate else [1, 4, 16, 64])
    arrivals: list[float | None] = [*rate] if rate else [None]
    loads = [Load(requests, level, one, seed) for level in levels for one in arrivals]
    outcomes, assumptions = schedule_stages.run_simulate(source, loads, out)
    if json_output:
        typer.echo(as_json({"outcomes": [asdict(o) for o in outcomes], "assumptions": assumptions}))
    else:
        print_simulation(outcomes, assumptions)

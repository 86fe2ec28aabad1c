"""`draftkit report`: a run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.options import LIBRARIES
from draftkit.errors import ConfigError
from draftkit.output import check_file
from draftkit.progress import doing
from draftkit.suggest import no_folder

EXAMPLE = "Example: draftkit report runs/quickstart"

RUN = "the folder of a run, or of an evaluation's results"


def command(
    run: Annotated[Path, typer.Argument(help="folder of a run, or of an evaluation's results")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="default: report.html in the run")] = None,
) -> None:
    """Make report.html of a run's files.

    What was trained on what, lengths, positions, confidences, speed, answers.

    One file that needs nothing else. Of a run that was cut off it shows what there is."""
    if not run.is_dir():
        raise ConfigError(f"{run}: {no_folder(run, RUN)}")
    page = out or run / "report.html"
    check_file(page)
    with doing(LIBRARIES):
        from draftkit.evaluate.html_report import write_report

    found = write_report(run, page)
    left_out = f" (not there: {'; '.join(found.missing)})" if found.missing else ""
    typer.echo(f"{page}{left_out}")

"""`draftkit suite`: the prompts of the paper's evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from draftkit.commands.early import check_folder
from draftkit.commands.options import JsonOption
from draftkit.output import as_json

EXAMPLE = "Example: draftkit suite fetch --from eval_datasets"


def command(
    action: Annotated[Literal["fetch"], typer.Argument(help="fetch: from the hub, or --from a folder")],
    source: Annotated[
        Path | None, typer.Option("--from", help="folder of files such as gsm8k.jsonl with turns")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="where it goes; default: the cache")] = None,
    json_output: JsonOption = False,
) -> None:
    """Fetch the nine sets of the paper's Table 1. Once, with the commit and licence of each, or from a
    folder; rows are counted. draftkit evaluate --suite paper asks them."""
    check_folder("--from", source, "a folder of files such as gsm8k.jsonl")
    from draftkit.evaluate.fetch import fetch_suite
    from draftkit.evaluate.suites import PAPER, copy_suite, missing_from, suite_folder

    place = out or suite_folder()
    counts = copy_suite(source, place) if source else fetch_suite(place)
    if json_output:
        typer.echo(as_json({"folder": str(place), "rows": counts}))
        return
    for one in PAPER:
        if one.name in counts:
            typer.echo(
                f"{one.name}: {counts[one.name]} rows, {min(one.drawn, one.rows)} are asked ({one.licence})"
            )
    if lost := missing_from(list(counts)):
        typer.echo(f"not there: {', '.join(lost)}")
    typer.echo(f"in {place}; next: draftkit evaluate --suite paper -d DRAFTER -o results -r RECIPE")

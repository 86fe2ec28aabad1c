"""`draftkit push`: a drafter to the hub, with an honest card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_folder
from draftkit.commands.options import LIBRARIES, JsonOption
from draftkit.draft.place import check_drafter
from draftkit.output import as_json
from draftkit.progress import doing

EXAMPLE = (
    "Example: draftkit push drafter/best you/qwen3-4b-dspark --results results --licence apache-2.0 --dry-run"
)


def command(
    drafter: Annotated[Path, typer.Argument(help="drafter folder")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub")],
    results: Annotated[Path | None, typer.Option(help="of draftkit evaluate: lengths for the card")] = None,
    licence: Annotated[str | None, typer.Option(help="of the drafter, as the hub names it")] = None,
    data: Annotated[str | None, typer.Option(help="what it was trained on, in words for the card")] = None,
    private: Annotated[bool, typer.Option("--private", help="make a private repository")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show files and card, send nothing")] = False,
    json_output: JsonOption = False,
) -> None:
    """Put a drafter on the Hugging Face hub.

    With a model card: measured lengths with intervals, what it was trained for, and the commands of the
    engines that load it. What nobody measured or stated, the card says so."""
    check_drafter(drafter)
    check_folder("--results", results, "the folder that `draftkit evaluate` wrote")
    with doing(LIBRARIES):
        from draftkit.handover.hub import push

    made = push(drafter, repo, results, licence, data, private, dry_run)
    if json_output:
        typer.echo(as_json(asdict(made), indent=1))
        return
    for name, size in made.files.items():
        typer.echo(f"{name}: {size:,} bytes")
    typer.echo(f"\n{made.card}" if dry_run else made.url)

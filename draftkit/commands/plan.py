"""`draftkit plan`: bytes, hours and memory of each stage, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
    OutOption,
    RecipeOption,
    SetOption,
    TargetOption,
    recipe_of,
    with_target,
)
from draftkit.output import as_json
from draftkit.progress import doing

EXAMPLE = "Example: draftkit plan -r qwen3-4b-dspark --count 1000000 --tokens 4096"


def command(
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    conversations: Annotated[
        list[Path] | None, typer.Option("--conversations", "-c", help="JSONL with answers; some are rendered")
    ] = None,
    count: Annotated[int, typer.Option(help="without files: so many conversations", min=1)] = 100_000,
    tokens: Annotated[int, typer.Option(help="without files: tokens of each", min=8)] = 2048,
    answers: Annotated[float, typer.Option(help="without files: share of answers", min=0.01, max=1)] = 0.5,
    devices: Annotated[int, typer.Option(help="devices that share each stage (torchrun)", min=1)] = 1,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s of one, instead of measuring this machine's", min=1e-3)
    ] = None,
    out: OutOption = Path(),
    json_output: JsonOption = False,
) -> None:
    """Bytes, hours and memory of each stage, before it runs. And whether features are better live or stored;
    no weights are needed. Exit code 2 where the disk of --out cannot hold the store."""
    overrides = with_target(overrides, target)
    settings = recipe_of(recipe, overrides)
    from draftkit.data.conversations import check_beginning
    from draftkit.target.place import deepseek_v4_switches

    check_beginning(conversations or [], False, deepseek_v4_switches(settings.target))
    with doing(LIBRARIES):
        from draftkit.plan import plan as planning

    made = planning.plan(settings, conversations or [], (count, tokens, answers), out, devices, tflops)
    if json_output:
        typer.echo(as_json(made.as_dict(), indent=1))
    else:
        for line in planning.lines(made):
            typer.echo(line)
    if not made.fits:
        raise planning.refuse(made, settings.capture.dtype)

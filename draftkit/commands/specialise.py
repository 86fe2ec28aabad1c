"""`draftkit specialise`: make a drafter for your own traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_given, check_pair
from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
    LogFormatOption,
    OutOption,
    SetOption,
    StartOption,
    with_target,
)
from draftkit.draft.place import check_drafter
from draftkit.output import as_json, make_folder
from draftkit.progress import doing
from draftkit.suggest import following

EXAMPLE = "Example: draftkit specialise --traces requests.jsonl --start-from drafter/best -o mine"


def command(
    out: OutOption,
    logs: Annotated[
        list[Path], typer.Option("--traces", help="logs; repeatable; formats: draftkit traces --help")
    ],
    start_from: StartOption = None,
    target: Annotated[str | None, typer.Option(help="folder or hub id; default: the recipe's")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="default: that of the drafter to start from, else tiny-dspark"),
    ] = None,
    overrides: SetOption = None,
    regenerate: Annotated[
        bool, typer.Option("--regenerate", help="let the target answer anew what was asked")
    ] = False,
    form: LogFormatOption = None,
    keep_secrets: Annotated[
        bool, typer.Option("--keep-secrets", help="mask no keys, tokens and mail addresses")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Make a drafter for your own traffic. Runs traces, capture and train, and prints a table of before and
    after on held-out conversations."""
    for log in logs:
        check_given("--traces", log, "a file of logs")
    make_folder(out)
    if target:
        check_pair(target, None, start_from)
    elif start_from:
        check_drafter(start_from)
    with doing(LIBRARIES):
        from draftkit.specialise import print_specialised, recipe_for, run_specialise

    settings = recipe_for(recipe, with_target(overrides, target), start_from, out)
    say = lambda line: typer.echo(line, err=json_output)  # noqa: E731
    found = run_specialise(settings, logs, out, start_from, regenerate, form, keep_secrets, say)
    if json_output:
        typer.echo(as_json(found.rows(), indent=1))
        return
    print_specialised(found)
    typer.echo(f"next: {following(f'serve --target {settings.target.path} --drafter {out}/drafter/best')}")

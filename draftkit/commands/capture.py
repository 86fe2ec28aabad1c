"""`draftkit capture`: let the target read conversations into a feature store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_inputs
from draftkit.commands.options import (
    LIBRARIES,
    FromOption,
    OutOption,
    ProbeOption,
    RecipeOption,
    SetOption,
    SkipOption,
    TargetOption,
    parse_from,
    recipe_of,
    with_target,
)
from draftkit.output import make_folder
from draftkit.progress import doing
from draftkit.suggest import following

EXAMPLE = "Example: draftkit capture -c answers.jsonl -o features"


def command(
    out: OutOption,
    conversations: Annotated[list[Path], typer.Option("--conversations", "-c", help="JSONL with answers")],
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    skip_invalid: SkipOption = False,
    source: FromOption = None,
    probe: ProbeOption = True,
    append: Annotated[
        bool, typer.Option("--append", help="add other conversations to a finished store")
    ] = False,
) -> None:
    """Let the target read conversations into a feature store. The same command goes on where it was
    interrupted. Several processes may share the work: start all of them, or torchrun, with the same
    command."""
    settings = recipe_of(recipe, with_target(overrides, target))
    make_folder(out)
    from draftkit.data.conversations import SkippedRows, check_beginning
    from draftkit.target.place import deepseek_v4_switches

    check_beginning(conversations, skip_invalid, deepseek_v4_switches(settings.target))
    check_inputs(settings)
    with doing(LIBRARIES):
        from draftkit import feature_stages, stages

    skipped = SkippedRows() if skip_invalid else None
    if source:
        files, tokenizer = stages.read_target(settings)
        read = stages.answers_of(settings, tokenizer, conversations, skipped)
        reader = feature_stages.server_reader(settings, files, parse_from(source), probe)
        report = feature_stages.capture_by(files, reader, tokenizer, settings, read, out, append)
    else:
        model, tokenizer = stages.open_target(settings, split=True)
        read = stages.answers_of(settings, tokenizer, conversations, skipped)
        report = feature_stages.run_capture(model, tokenizer, settings, read, out, append)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks
        return
    if skipped:
        skipped.report()
    typer.echo(
        f"{report.samples} samples, {report.tokens} tokens in {out} ({report.left_out()}); "
        f"next: {following(f'train -f {out} -o drafter', recipe, overrides, target)}"
    )

"""`draftkit mix`: mix data sets into one file, each question once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_given
from draftkit.commands.options import (
    JsonOption,
    OutOption,
    SkipOption,
)
from draftkit.output import as_json, check_file
from draftkit.suggest import following

EXAMPLE = "Example: draftkit mix mixture.yaml -o prompts.jsonl --limit 50000"


def command(
    mixture: Annotated[
        Path, typer.Argument(help="YAML with sources: presets, hub ids or files, weights, caps in tokens")
    ],
    out: OutOption,
    limit: Annotated[int | None, typer.Option(help="conversations in all", min=1)] = None,
    skip_invalid: SkipOption = False,
    json_output: JsonOption = False,
) -> None:
    """Mix data sets into one file, each question once.

    Presets: open-perfectblend, sharegpt, ultrachat, magpie, nemotron-chat, nemotron-code, nemotron-math,
    toolace and hermes-tools; they and hub ids are read through `datasets` (extra `data`)."""
    check_given("", mixture, "a YAML file of sources")
    check_file(out)
    from dataclasses import asdict

    from draftkit.data.conversations import SkippedRows
    from draftkit.data.sources import mix as write_mixture
    from draftkit.data.sources import read_mixture

    chosen = read_mixture(mixture)
    skipped = SkippedRows() if skip_invalid else None
    report = write_mixture(chosen, out, limit, skipped)
    if skipped:
        skipped.report()
    if json_output:
        typer.echo(as_json(asdict(report)))
        return
    for name, count in report.conversations.items():
        typer.echo(f"{name}: {count} conversations, about {report.tokens[name]:,} tokens")
    typer.echo(
        f"{report.repeated} left out as there before; next: "
        f"{following(f'generate -p {out} -o answers.jsonl')}"
    )

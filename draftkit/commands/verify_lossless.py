"""`draftkit verify-lossless`: prove that drafting leaves the distribution unchanged."""

from __future__ import annotations

from typing import Annotated

import typer

from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
)
from draftkit.progress import doing

EXAMPLE = "Example: draftkit verify-lossless --tables 200"


def command(
    vocab: Annotated[int, typer.Option(help="tokens in the vocabulary", min=2, max=3)] = 3,
    gamma: Annotated[
        list[int] | None, typer.Option(help="drafted tokens, 1 to 3; repeatable; default: 2 and 3")
    ] = None,
    tables: Annotated[int, typer.Option(help="random (target, drafter, confidence) tables", min=1)] = 6,
    json_output: JsonOption = False,
) -> None:
    """Prove that drafting leaves the distribution unchanged. By enumeration, for each rule and planner; exit
    code 1 if it does not."""
    with doing(LIBRARIES):
        from draftkit.evaluate.lossless import print_lossless, run_lossless

    findings = run_lossless(vocab, gamma or [2, 3], tables)
    if not print_lossless(findings, tables, vocab, json_output):
        raise typer.Exit(1)

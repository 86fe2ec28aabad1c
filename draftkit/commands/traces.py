"""`draftkit traces`: make conversations of the logs of your traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_given
from draftkit.commands.options import (
    JsonOption,
    LogFormatOption,
    OutOption,
)
from draftkit.output import as_json, make_folder
from draftkit.suggest import following

EXAMPLE = "Example: draftkit traces requests.jsonl ~/.codex/sessions/rollout.jsonl -o traces"


def command(
    logs: Annotated[list[Path], typer.Argument(help="logs, as they lie on disk")],
    out: OutOption,
    form: LogFormatOption = None,
    validation_share: Annotated[float, typer.Option(help="of the conversations", min=0, max=0.5)] = 0.05,
    held_out_share: Annotated[float, typer.Option(help="of the conversations", min=0, max=0.5)] = 0.1,
    keep_secrets: Annotated[
        bool, typer.Option("--keep-secrets", help="mask no keys, tokens and mail addresses")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Make conversations of the logs of your traffic.

    They are split by conversation into train.jsonl, validation.jsonl and heldout.jsonl.

    Formats: bodies (requests and responses of the chat API, LiteLLM's log, conversations), vllm (its log with
    --enable-log-requests), otel (OpenTelemetry GenAI spans), claude-code and codex (their session files)."""
    for log in logs:
        check_given("", log, "a file of logs")
    make_folder(out)
    from dataclasses import asdict

    from draftkit.data.traces import make_traces

    report, skipped = make_traces(logs, out, form, validation_share, held_out_share, keep_secrets)
    skipped.report()
    if json_output:
        typer.echo(as_json(asdict(report)))
        return
    for line in report.lines():
        typer.echo(line)
    typer.echo(f"next: {following(f'capture -c {out}/train.jsonl -o features')}, or draftkit specialise")

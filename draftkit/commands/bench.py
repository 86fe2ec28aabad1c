"""`draftkit bench`: measure latency and speed of a server under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from draftkit.commands.early import check_given
from draftkit.commands.numbers import whole_numbers
from draftkit.commands.options import (
    JsonOption,
)
from draftkit.output import as_json
from draftkit.serve.settings import LoadSettings

EXAMPLE = "Example: draftkit bench --url http://127.0.0.1:8000 --compare-drafts --concurrency 1,8"


def command(
    urls: Annotated[list[str], typer.Option("--url", help="server; give two to compare them")],
    compare_drafts: Annotated[
        bool, typer.Option("--compare-drafts", help="one draftkit server, with its drafts and without")
    ] = False,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(help="users at once, as 1,8; default: 1, with --rate 256, the most at once"),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Poisson arrivals per second instead of waiting users")
    ] = None,
    requests: Annotated[
        int, typer.Option(help="per level; without --rate at least two per user")
    ] = LoadSettings.requests,
    warmup: int = LoadSettings.warmup,
    max_tokens: int = LoadSettings.max_tokens,
    temperature: float = LoadSettings.temperature,
    ignore_eos: Annotated[
        bool,
        typer.Option(help="answers go on to --max-tokens, so that all servers make as many tokens"),
    ] = LoadSettings.ignore_eos,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", "-p", help="JSONL; default: the embedded ones")
    ] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="per server, in order")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder for bench.json and bench.png")
    ] = None,
    seed: int = LoadSettings.seed,
    json_output: JsonOption = False,
) -> None:
    """Measure latency and speed of a server under load.

    One OpenAI-compatible server, or two to compare them.

    Exit code 2 when a request fails; what was measured is printed and written all the same."""
    check_given("--prompts", prompts, "a JSONL file of prompts")
    from draftkit.serve.bench import read_prompts, run_bench
    from draftkit.serve.bench_report import print_bench

    source = prompts or Path(__file__).parent.parent / "assets" / "tiny" / "heldout.jsonl"
    settings = LoadSettings(
        read_prompts(source), requests, warmup, 1, rate, max_tokens, temperature, ignore_eos, seed=seed
    )

    def show(results: dict[str, Any]) -> None:
        typer.echo(as_json(results)) if json_output else print_bench(results)

    # By default nothing but the server holds arrivals up.
    levels = whole_numbers("--concurrency", concurrency) or [1 if rate is None else 256]
    run_bench(urls, levels, settings, out, api_key or (), show, compare_drafts)

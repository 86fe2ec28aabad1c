"""`draftkit doctor`: why a drafter loses acceptance."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_engine, check_given
from draftkit.commands.options import LIBRARIES, JsonOption
from draftkit.draft.place import check_drafter
from draftkit.errors import ConfigError
from draftkit.output import as_json
from draftkit.progress import doing

EXAMPLE = "Example: draftkit doctor --target Qwen/Qwen3-4B --drafter drafter/best --engine vllm"


def command(
    drafter: Annotated[Path, typer.Option("--drafter", "-d", help="drafter folder, in any form")],
    target: Annotated[str, typer.Option(help="folder, GGUF file or hub name; or tiny, smollm2")] = "tiny",
    engine: Annotated[
        str | None, typer.Option(help="that will run the pair: vllm, sglang, llama.cpp or mlx")
    ] = None,
    url: Annotated[str | None, typer.Option(help="running server of the pair, which is asked too")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="of the server")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", "-p", help="JSONL; default: the embedded ones")
    ] = None,
    context: Annotated[int, typer.Option(help="longest context to try, in tokens", min=64)] = 2048,
    switches: Annotated[
        list[str] | None,
        typer.Option("--switch", help="template variable as served, e.g. enable_thinking=false; repeatable"),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Find out why a drafter loses acceptance.

    Files, text, engine, and short runs that try what may be wrong.

    Each finding is one line with what it costs and the mend; then facts: accepted length, break-even on this
    machine, how many tokens to draft. Exit code 1 when something was found."""
    chosen = _switches(switches or [])
    check_engine(engine)
    check_drafter(drafter)
    if prompts is not None:
        check_given("--prompts", prompts, "a JSONL file of conversations")
    with doing(LIBRARIES):
        from draftkit.doctor.examine import DoctorSettings, examine, print_examination

    settings = DoctorSettings(prompts or DoctorSettings.prompts, context=context, switches=chosen)
    found = examine(target, drafter, settings, engine, url, api_key)
    typer.echo(as_json(asdict(found), indent=1)) if json_output else print_examination(found)
    if found.findings:
        raise typer.Exit(1)


def _switches(texts: list[str]) -> dict[str, object]:
    """Values as YAML reads them, as `--set` of other commands does. Raises ConfigError."""
    import yaml

    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--switch {text}: give NAME=VALUE, as enable_thinking=false")
        found[name] = yaml.safe_load(value)
    return found

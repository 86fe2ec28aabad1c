"""`draftkit generate`: let the target answer prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from draftkit.commands.early import check_answers, check_inputs
from draftkit.commands.options import (
    LIBRARIES,
    OutOption,
    PromptsOption,
    RecipeOption,
    SetOption,
    SkipOption,
    TargetOption,
    recipe_of,
    with_target,
)
from draftkit.errors import ConfigError
from draftkit.output import check_file
from draftkit.progress import doing
from draftkit.suggest import following

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftkit.data.messages import Conversation

EXAMPLE = "Example: draftkit generate -p prompts.jsonl -o answers.jsonl --set generate.temperature=0.7"


def command(
    out: OutOption,
    prompts: PromptsOption = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    skip_invalid: SkipOption = False,
    servers: Annotated[
        list[str] | None, typer.Option("--server", help="OpenAI-compatible server that answers; repeatable")
    ] = None,
    model: Annotated[str | None, typer.Option(help="its name at the servers; default: their first")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="of the servers")] = None,
) -> None:
    """Let the target answer prompts. The same command goes on where it was interrupted, and several processes
    that are given the same command share the work."""
    settings = recipe_of(recipe, with_target(overrides, target))
    if any(out.resolve() == path.resolve() for path in prompts or []):
        raise ConfigError(f"--out {out} is the file of prompts; choose another")
    check_file(out)
    from draftkit.data.conversations import (
        SkippedRows,
        check_beginning,
        count_rows,
        iterate_rows,
    )
    from draftkit.target.place import deepseek_v4_switches

    check_beginning(prompts or [], skip_invalid, deepseek_v4_switches(settings.target))
    check_answers(out, prompts or [], skip_invalid)
    check_inputs(settings)
    with doing(LIBRARIES):
        from draftkit import stages

    paths = prompts or [stages.TINY_PROMPTS]
    skipped = SkippedRows() if skip_invalid else None

    def read(first: int) -> Iterator[Conversation | None]:
        return iterate_rows(paths, skipped and skipped.anew(), first, deepseek_v4_switches(settings.target))

    total = count_rows(paths)
    if servers:
        report = stages.run_generate_by_servers(settings, read, out, servers, model, api_key, total, skipped)
    else:
        opened = stages.open_target(settings)
        report = stages.run_generate(*opened, settings, read, out, total=total, skipped=skipped)
    if skipped:
        skipped.report()
    ends = ", ".join(f"{count} {reason}" for reason, count in sorted(report.reasons.items()))
    typer.echo(
        f"{report.records} conversations ({ends}) in {out}; next: "
        f"{following(f'capture -c {out} -o features', recipe, overrides, target)}"
    )

"""`draftkit profile`: measure what a step costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_inputs
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
from draftkit.errors import ConfigError
from draftkit.output import check_file
from draftkit.progress import doing
from draftkit.suggest import following

EXAMPLE = "Example: draftkit profile -d drafter/best -o step_rate.json"


def command(
    out: OutOption,
    drafter: Annotated[
        Path | None, typer.Option("--drafter", "-d", help="drafter folder; none = the target only")
    ] = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    tokens: Annotated[list[int] | None, typer.Option(help="tokens per pass, at least 1; repeatable")] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="tokens a request has already; repeatable")
    ] = None,
    repeats: Annotated[int, typer.Option(help="medians of so many", min=1)] = 9,
    threads: Annotated[int | None, typer.Option(help="torch threads", min=1)] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure what a step costs on this machine. By tokens, context and requests; SGLang reads the result."""
    overrides = with_target(overrides, target)
    settings = recipe_of(recipe, overrides)
    if out.suffix == ".png":
        raise ConfigError(
            f"--out {out} is the name of the plot, which lies beside the result; give one that ends in .json"
        )
    check_file(out)
    check_inputs(settings, drafter)
    with doing(LIBRARIES):
        import torch

        from draftkit import schedule_stages, stages
        from draftkit.draft.checkpoint import open_drafter
        from draftkit.evaluate.profile import profile_settings
        from draftkit.evaluate.schedule_report import print_step_rate

    if threads:
        torch.set_num_threads(threads)
    model, _ = stages.open_target(settings)
    opened = open_drafter(drafter, model) if drafter else None
    table = schedule_stages.run_profile(
        model, opened, drafter, profile_settings(tokens, context, repeats), out
    )
    if json_output:
        typer.echo(out.read_text("utf-8"))
    else:
        print_step_rate(table)
        serving = f"serve --target {settings.target.path}"
        known = f" --drafter {drafter} --step-rate {out}" if drafter else ""
        typer.echo(f"written to {out}; next: {following(serving + known)}")

"""`draftkit recipes`: the packaged descriptions of runs, listed, or one of them shown whole."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLE = "Example: draftkit recipes dspark-plus"


def complete_recipe(typed: str) -> list[str]:
    """Names for the shell's completion."""
    from draftkit.config import packaged_recipes

    return [name for name in packaged_recipes() if name.startswith(typed)]


def command(
    name: Annotated[
        str | None,
        typer.Argument(help="show this one, every default written out", autocompletion=complete_recipe),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the packaged recipes, or show one."""
    from draftkit.config import RECIPES, dump_recipe, load_recipe, packaged_recipes
    from draftkit.output import as_json

    if name is not None:
        recipe = load_recipe(name)
        typer.echo(as_json(recipe.model_dump(), indent=1) if json_output else dump_recipe(recipe).rstrip())
        return
    loaded = {one: load_recipe(one) for one in packaged_recipes()}
    if json_output:
        rows = [
            {"name": one, "target": r.target.path, "algorithm": r.drafter.algorithm}
            for one, r in loaded.items()
        ]
        typer.echo(as_json(rows, indent=1))
        return
    for one, recipe in loaded.items():
        typer.echo(f"{one:<18}  {recipe.drafter.algorithm:<7} for {recipe.target.path}")
    typer.echo(f"\nShow one: draftkit recipes NAME. The files, with reasons: {RECIPES}")

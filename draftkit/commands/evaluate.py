"""`draftkit evaluate`: accepted length and speed of a pair, on own prompts or on the paper's suite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftkit.commands.early import check_folder, check_inputs
from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
    OutOption,
    PromptsOption,
    RecipeOption,
    SetOption,
    TargetOption,
    with_target,
)
from draftkit.errors import ConfigError
from draftkit.output import make_folder
from draftkit.progress import doing
from draftkit.suggest import following

if TYPE_CHECKING:
    from draftkit.config import Recipe
    from draftkit.evaluate.run import EvalResult

EXAMPLE = "Example: draftkit evaluate -d drafter/best -o results --set evaluate.temperatures=[1.0]"


def command(
    out: OutOption,
    drafter: Annotated[Path, typer.Option("--drafter", "-d", help="drafter folder")],
    prompts: PromptsOption = None,
    suite: Annotated[
        str | None, typer.Option(help="paper: the nine sets of its Table 1; see draftkit suite fetch")
    ] = None,
    suite_folder: Annotated[
        Path | None, typer.Option(help="where the suite lies; default: the cache")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="prompts of each set of the suite", min=1)] = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    threads: Annotated[int | None, typer.Option(help="torch threads", min=1)] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure accepted length and speed on held-out prompts. By domain, and against plain decoding.

    With --suite paper on the prompts of the paper's Table 1, drawn as its code draws them, and beside its
    numbers; torchrun shares the prompts among processes."""
    from draftkit.config import load_recipe

    settings = load_recipe(recipe, with_target(overrides, target))
    if suite not in (None, "paper"):
        raise ConfigError(f"--suite {suite}: is not known, there is paper")
    if suite and prompts:
        raise ConfigError("--suite has its own prompts; leave out --prompts")
    check_folder("--suite-folder", suite_folder, "the folder of `draftkit suite fetch --out`")
    make_folder(out)
    check_inputs(settings, drafter, prompts or [])
    with doing(LIBRARIES):
        from draftkit import evaluate_stages, stages
        from draftkit.evaluate.plots import plot_acceptance
        from draftkit.evaluate.report import print_report

    if threads:
        import torch

        torch.set_num_threads(threads)
    if suite:
        results = _suite(settings, drafter, suite_folder, out, limit, json_output)
    else:
        read = stages.read_prompts(prompts or [stages.TINY_HELD_OUT], settings)
        model, tokenizer = stages.open_target(settings)
        results = evaluate_stages.run_evaluate(model, tokenizer, settings, drafter, read, out, threads)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks
        return
    plot_acceptance(results, out / "acceptance.png")
    if json_output:
        typer.echo(evaluate_stages.summary(results))
        return
    print_report(results)
    typer.echo(f"next: {following(f'serve -d {drafter}', target=settings.target.path)}")


def _suite(
    settings: Recipe, drafter: Path, folder: Path | None, out: Path, limit: int | None, quiet: bool
) -> list[EvalResult]:
    """The paper's suite, with its table on standard output."""
    from draftkit import stages
    from draftkit.draft.checkpoint import read_config
    from draftkit.evaluate.paper import print_beside_paper
    from draftkit.evaluate.suites import missing_from, read_suite, suite_folder
    from draftkit.suite_stages import run_suite, say_skipped

    place = folder or suite_folder()
    found = read_suite(place)  # a mistake shows before the target is loaded
    target, tokenizer = stages.open_target(settings)
    results = run_suite(target, tokenizer, settings, drafter, place, out, limit)
    if results and not quiet:
        algorithm = read_config(drafter, target.info.num_layers).algorithm
        for result in results:
            print_beside_paper(result, algorithm)
    say_skipped(results)
    if results and (lost := missing_from(list(found))):
        typer.echo(f"not in {place}: {', '.join(lost)}", err=True)
    return results

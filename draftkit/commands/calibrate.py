"""`draftkit calibrate`: fit a drafter's confidences to what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_inputs
from draftkit.commands.options import (
    LIBRARIES,
    JsonOption,
    OutOption,
    PromptsOption,
    RecipeOption,
    SetOption,
    TargetOption,
    recipe_of,
    with_target,
)
from draftkit.output import as_json, make_folder
from draftkit.progress import doing
from draftkit.suggest import following

EXAMPLE = "Example: draftkit calibrate -d drafter/best -o calibration"


def command(
    out: OutOption,
    drafter: Annotated[Path, typer.Option("--drafter", "-d", help="drafter folder")],
    prompts: PromptsOption = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    temperature: Annotated[float, typer.Option(help="of the target's sampling", min=0)] = 1.0,
    json_output: JsonOption = False,
) -> None:
    """Fit a drafter's confidences to what is accepted. Proposals are recorded along held-out answers; SGLang
    reads the result."""
    from dataclasses import asdict

    settings = recipe_of(recipe, with_target(overrides, target))
    make_folder(out)
    check_inputs(settings, drafter, prompts or [])
    with doing(LIBRARIES):
        from draftkit import evaluate_stages, schedule_stages, stages
        from draftkit.draft.checkpoint import open_drafter
        from draftkit.evaluate.schedule_report import calibration_notes, print_calibration
        from draftkit.ops.sampling import Sampling

    read = stages.read_prompts(prompts or [stages.TINY_HELD_OUT], settings)
    model, tokenizer = stages.open_target(settings)
    stages.check_drafter_switches(settings, drafter)
    shown = stages.prompt_format(settings, tokenizer)
    chosen = evaluate_stages.first_turns(shown, read, settings.evaluate.prompts_per_domain)
    limit, seed = settings.evaluate.max_new_tokens, settings.evaluate.seed
    opened, file = open_drafter(drafter, model), out / schedule_stages.TRACES
    traces = schedule_stages.run_record(
        model, opened, drafter, chosen, Sampling(temperature), limit, seed, file
    )
    found = schedule_stages.run_calibrate(traces, out)
    if json_output:
        typer.echo(as_json(asdict(found)))
    else:
        print_calibration(
            found.calibration.temperatures, found.before, found.after, found.held_out_rows, found.missing
        )
        for note in calibration_notes(found.before, found.after, found.prompts, found.refused):
            typer.echo(note)
        typer.echo(
            f"written to {out / schedule_stages.CALIBRATION}; next: "
            f"{following(f'profile -d {drafter} -o step_rate.json', recipe, overrides, target)}, then "
            f"{following(f'simulate --traces {file} --calibration {out / schedule_stages.CALIBRATION}')} "
            "--step-rate step_rate.json"
        )

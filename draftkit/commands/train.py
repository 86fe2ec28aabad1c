"""`draftkit train`: train a drafter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from draftkit.commands.early import check_inputs, check_store
from draftkit.commands.options import (
    LIBRARIES,
    FromOption,
    OutOption,
    ProbeOption,
    RecipeOption,
    SetOption,
    StartOption,
    TargetOption,
    parse_from,
    recipe_of,
    with_target,
)
from draftkit.errors import ConfigError
from draftkit.output import make_folder
from draftkit.progress import doing
from draftkit.suggest import following

EXAMPLE = (
    "Examples: draftkit train -f features -o drafter --set train.epochs=4; "
    "draftkit train -c answers.jsonl -o drafter"
)


def command(
    out: OutOption,
    features: Annotated[
        list[str] | None,
        typer.Option(
            "--features",
            "-f",
            help="feature store, or what DeepSpec or speculators stored; repeatable, FOLDER=0.5 takes a half "
            "in an epoch",
        ),
    ] = None,
    conversations: Annotated[
        list[Path] | None,
        typer.Option(
            "--conversations", "-c", help="JSONL with answers: the target reads them while the drafter trains"
        ),
    ] = None,
    target: TargetOption = None,
    recipe: RecipeOption = "tiny-dspark",
    overrides: SetOption = None,
    start_from: StartOption = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="feature store to validate on; default: a share of what is learnt from"),
    ] = None,
    source: FromOption = None,
    probe: ProbeOption = True,
) -> None:
    """Train a drafter. On a feature store, on live features of conversations, or on both: then the first
    epoch fills the store. The same command goes on where it was interrupted."""
    settings = recipe_of(recipe, with_target(overrides, target))
    if not features and not conversations:
        raise ConfigError("give --features (a store), --conversations (live), or both (live, and kept)")
    if source and not conversations:
        raise ConfigError("--from reads --conversations; give some, or leave --from out")
    if conversations and len(features or []) > 1:
        raise ConfigError("--conversations fill one store; give one --features, or none")
    make_folder(out)
    for store in features or []:
        if not conversations:  # which would fill it
            check_store(
                "--features", Path(store if Path(store).exists() else store.rpartition("=")[0] or store)
            )
    if validation is not None:
        check_store("--validation", validation)
    check_inputs(settings, start_from, conversations or [])
    with doing(LIBRARIES):
        from draftkit import feature_stages, stages, train_stages

    keep = Path(features[0]) if features else None

    def aside(target: Any, tokenizer: Any) -> Any:
        folders = [validation] if validation else []
        return feature_stages.open_features(settings, target, tokenizer, folders, probe) if folders else None

    if source and conversations:
        files, tokenizer = stages.read_target(settings)
        read = stages.answers_of(settings, tokenizer, conversations)
        last_hidden = keep is not None or validation is None
        reader = feature_stages.server_reader(settings, files, parse_from(source), probe, last_hidden)
        live = feature_stages.live_features_by(files, reader, True, tokenizer, settings, read, out, keep)
        held = aside(files, tokenizer)
        report = train_stages.run_train(files, tokenizer, settings, live, out, None, start_from, held)
    elif conversations:
        model, tokenizer = stages.open_target(settings)
        read = stages.answers_of(settings, tokenizer, conversations)
        live = feature_stages.live_features(model, tokenizer, settings, read, out, keep)
        held = aside(model, tokenizer)
        report = train_stages.run_train(
            model, tokenizer, settings, live, out, lambda: model, start_from, held
        )
    else:
        files, tokenizer = stages.read_target(settings)
        stored = feature_stages.open_features(settings, files, tokenizer, features or [], probe)
        held = aside(files, tokenizer)
        report = train_stages.run_train(files, tokenizer, settings, stored, out, None, start_from, held)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks
        return
    best = out / "best"
    typer.echo(
        f"{report.steps} steps in {report.seconds:.0f} s, simulated accepted length {report.best:.2f}; "
        f"next: {following(f'evaluate -d {best} -o results', recipe, overrides, target)} "
        "(add -p FILE: prompts of your own that it never saw)"
    )

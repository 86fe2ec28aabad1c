"""Training as a stage: from features to a drafter, a fresh one or one that goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from draftkit.config import Recipe, dump_recipe
from draftkit.data.mask_token import choose_mask_token
from draftkit.draft.algorithms import algorithm_named
from draftkit.draft.checkpoint import new_drafter, open_drafter
from draftkit.draft.drafter import Drafter, DrafterShape
from draftkit.draft.eagle3_shape import NORMS
from draftkit.draft.families import block_shape, style_of
from draftkit.draft.warm_start import CapturedText
from draftkit.errors import ConfigError
from draftkit.features.draft_vocabulary import choose_draft_vocabulary, count_answer_tokens, count_tokens
from draftkit.features.source import FeatureSource
from draftkit.output import one_writer, write_text
from draftkit.progress import progress_bar
from draftkit.stages import check_drafter_switches, feature_layers, open_target
from draftkit.target.fingerprint import fingerprint
from draftkit.target.interface import Target, TargetWeights
from draftkit.target.tokenizer import template_hash
from draftkit.target.transformers import DTYPES
from draftkit.train import trainer
from draftkit.train.parallel import join_world
from draftkit.train.trainer import TrainReport

START_TOKENS = 4096  # that the fitted parts of a start are fitted to: thousands of vectors for each number


def drafter_config(
    recipe: Recipe, target: TargetWeights, tokenizer: Any, source: FeatureSource | None = None
) -> DrafterShape:
    """The drafter's shape: the recipe's choices, the target's sizes, and a mask token that the data in
    `source` does not use."""
    section, text = recipe.drafter, target.text_config
    algorithm = algorithm_named(section.algorithm)
    automatic = algorithm.style or style_of(target.info.family)
    sizes = asdict(block_shape(text, automatic if section.style == "auto" else section.style)) | {
        "hidden_size": target.info.hidden_size,
        "num_layers": section.num_layers or algorithm.layers,
        "vocab_size": target.info.vocab_size,
        "feature_layers": feature_layers(recipe, target),
        "num_target_layers": target.info.num_layers,
        "block_size": section.block_size,
        "max_length": target.info.max_length,
        **algorithm.target_sizes(text),
    }
    if section.intermediate_size:
        sizes["intermediate_size"] = section.intermediate_size
    vocab, mask = target.info.vocab_size, 0
    if algorithm.masks:
        count = lambda: count_tokens(source, vocab) if source else torch.zeros(vocab, dtype=torch.int64)  # noqa: E731
        mask = choose_mask_token(tokenizer, vocab, section.mask_token_id, count)
    return algorithm.shape(section, sizes, mask)


@one_writer()
def run_train(
    target: TargetWeights,
    tokenizer: Any,
    recipe: Recipe,
    source: FeatureSource,
    out: Path,
    model: Callable[[], Target] | None = None,
    start_from: Path | None = None,
    validation: FeatureSource | None = None,
) -> TrainReport:
    """Stage 3: a drafter is trained on features of this very target and prompt format (`feature_stages`).

    Nothing but the answers for the log (`train.decode_prompts`) needs the model itself: `model` gives it,
    null loads it then. Where several processes train together there are no such answers, and none of them
    loads it. `start_from` is the folder of a drafter that goes on; it must be of this target and of the
    recipe's shape. `validation` are features to validate on, in place of a share of `source`.
    """
    if start_from is None:
        drafter = new_drafter_for(recipe, target, tokenizer, source)
        start = f"{recipe.drafter.start} {recipe.drafter.start_layers}"
    else:
        drafter = drafter_to_continue(recipe, target, tokenizer, source, start_from)
        start = f"drafter {fingerprint(start_from)}"
    provenance = {
        "target": target.info.name,
        "target_fingerprint": target.info.fingerprint,
        "template_hash": template_hash(tokenizer),
        "template_switches": recipe.target.template_switches,
        "recipe": recipe.model_dump(),
        **({"started_from": fingerprint(start_from)} if start_from else {}),
    }
    with progress_bar("train", 100, percent=True) as bar, join_world() as world:

        def show(p: trainer.Progress) -> None:
            note = f"step {p.step}, {p.step / max(p.seconds, 1e-9):.1f} steps/s, loss {p.loss:.3f}"
            note += f", accepted length {p.accepted_len:.2f}" if p.accepted_len else ""
            bar.update(completed=int(100 * p.share), note=note)

        def note_recipe() -> None:
            write_text(out / "recipe.yaml", dump_recipe(recipe))

        load = model or (lambda: open_target(recipe)[0])
        return trainer.train(
            source,
            drafter,
            load,
            out,
            recipe.train,
            provenance,
            world,
            show,
            note_recipe,
            start,
            start_from is not None,
            validation,
            bar,
        )


def new_drafter_for(
    recipe: Recipe, target: TargetWeights, tokenizer: Any, source: FeatureSource | None = None
) -> Drafter:
    """A fresh drafter, seeded by the recipe, on the target's embedding and head.

    A reduced draft vocabulary holds the most frequent tokens of the answers in `source`.
    """
    torch.manual_seed(recipe.train.seed)
    config, ids_W = drafter_config(recipe, target, tokenizer, source), None
    if config.draft_vocab_size and source is not None:
        ids_W = choose_draft_vocabulary(
            count_answer_tokens(source, config.vocab_size), config.draft_vocab_size
        )
    drafter = new_drafter(config, target.embedding_weight(), target.head_weight(), ids_W)
    if recipe.drafter.start == "target":
        start = algorithm_named(recipe.drafter.algorithm).start
        if start is None:
            raise ConfigError(
                f"drafter.start: target is for dspark and dflash; {recipe.drafter.algorithm} begins at random"
            )
        text = _some_text(source) if source is not None else None
        start(drafter, list(target.layers), target.final_norm(), recipe.drafter.start_layers, text)
    return drafter


def drafter_to_continue(
    recipe: Recipe, target: TargetWeights, tokenizer: Any, source: FeatureSource, folder: Path
) -> Drafter:
    """A drafter that was trained before, in float32, ready to learn on.

    Raises CheckpointError when it was made for another target, ConfigError that names the field in which the
    recipe's shape differs from its own, or the template switches it was trained with.
    """
    check_drafter_switches(recipe, folder)
    drafter = open_drafter(folder, target, DTYPES["float32"])
    shape = drafter_config(recipe, target, tokenizer, source)
    if type(drafter.config) is not type(shape):
        raise ConfigError(
            f"{folder}: is of another algorithm than the recipe's {recipe.drafter.algorithm}; give its recipe"
        )
    # no recipe says these: those of the drafter stay
    free = {"max_length", "rope_scaling", "norm_before_residual", *NORMS}
    free |= set() if recipe.drafter.mask_token_id is not None else {"mask_token_id"}
    wanted = asdict(shape)
    for name, value in asdict(drafter.config).items():
        if name not in free and wanted[name] != value:
            differs = f"{name} is {_shown(value)}, the recipe has {_shown(wanted[name])}"
            raise ConfigError(f"{folder}: {differs}; give the same to go on with this drafter")
    return drafter


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _some_text(source: FeatureSource) -> CapturedText:
    """The first samples of a source, about START_TOKENS tokens of them, with their features."""
    tokens, features, count = [], [], 0
    for index in range(len(source)):
        [sample] = source.read([index])
        tokens.append(sample.tokens_T[: sample.context])
        features.append(sample.features_TF[: sample.context].cpu())
        count += len(tokens[-1])
        if count >= START_TOKENS:
            break
    return CapturedText(torch.cat(tokens), torch.cat(features))

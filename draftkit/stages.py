"""The stages of the pipeline, each from files to files, as the command line and the quickstart run them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from draftkit.config import Recipe
from draftkit.data.answers import Answers
from draftkit.data.conversations import (
    SkippedRows,
    count_rows,
    iterate_conversations,
)
from draftkit.data.generate import GenerateReport, generate_file
from draftkit.data.messages import Conversation
from draftkit.data.parts import SharedWork
from draftkit.data.records import check_rendered_as, made_with, read_manifest
from draftkit.data.refused import learnt_ones
from draftkit.data.servers import ServerAnswers
from draftkit.draft.algorithms import algorithm_named
from draftkit.draft.checkpoint import load_drafter, open_drafter, save_drafter
from draftkit.draft.checkpoint_files import INDEX, WEIGHTS, read_provenance
from draftkit.engine.answers import answerer
from draftkit.errors import ConfigError
from draftkit.handover.deepseek_v4 import BUNDLED, SUBFOLDER, hand_over_module
from draftkit.output import check_free, make_folder
from draftkit.progress import clock, doing, progress_bar
from draftkit.target.formats import format_of
from draftkit.target.interface import TargetWeights
from draftkit.target.loading import best_device, load_target
from draftkit.target.place import EMBEDDED, deepseek_v4_switches
from draftkit.target.prompt_format import PromptFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import DTYPES, TransformersTarget
from draftkit.target.weights import TargetFiles

TINY_PROMPTS, TINY_HELD_OUT = EMBEDDED / "prompts.jsonl", EMBEDDED / "heldout.jsonl"


def open_target(
    recipe: Recipe, device: str | None = None, split: bool = False
) -> tuple[TransformersTarget, Any]:
    """The recipe's target and its tokenizer; without a device, on a GPU where there is one. `split`: whether
    the stage can do with a target that several processes hold together.

    Raises ConfigError where target.spread is nothing for the stage, or for one process.
    """
    section = recipe.target
    algorithm_named(recipe.drafter.algorithm)  # a mistake shows before the target is loaded
    if section.spread == "tensors" and not split:
        raise ConfigError(
            "target.spread: tensors is for capture alone; elsewhere give layers, or let vLLM answer and read"
        )
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if section.spread == "tensors" and not several:
        raise ConfigError("target.spread: tensors needs several processes; start them with torchrun")
    if section.spread == "layers" and several:
        raise ConfigError("target.spread: layers is for one process; start it without torchrun")
    with doing(f"loading the target {section.path}"):
        place = device or best_device()
        target = load_target(section.path, section.revision, section.dtype, place, section.spread)
        return target, load_tokenizer(section.path, section.revision)


def prompt_format(recipe: Recipe, tokenizer: Any, today: str | None = None) -> PromptFormat:
    """How the recipe's target is shown conversations, all on one day: `today`, that of an earlier part of the
    run, or the clock's.

    Raises ConfigError for template switches that the chat template does not know.
    """
    return format_of(
        tokenizer, recipe.target.template_switches, date.fromisoformat(today) if today else date.today()
    )


def read_target(recipe: Recipe) -> tuple[TargetFiles, Any]:
    """What the files of the recipe's target say, and its tokenizer; the model is not loaded."""
    section = recipe.target
    algorithm_named(recipe.drafter.algorithm)
    return TargetFiles(section.path, section.revision, section.dtype), load_tokenizer(
        section.path, section.revision
    )


def run_generate(
    target: TransformersTarget,
    tokenizer: Any,
    recipe: Recipe,
    prompts: Callable[[int], Iterable[Conversation | None]],
    out: Path,
    answers: Answers | None = None,
    total: int | None = None,
    skipped: SkippedRows | None = None,
) -> GenerateReport:
    """Stage 1: the target answers the prompts, `total` of them where that is known, by `answers` where
    they are at hand. Those that the chat template refuses go into `skipped`, where it is given."""
    shown = prompt_format(recipe, tokenizer, (read_manifest(out) or {}).get("today"))
    about = made_with(shown, target.info.fingerprint, target.info.stop_token_ids, recipe.generate)
    if answers is None:
        with doing("compiling the target's passes and reserving memory"):
            answers = answerer(target, recipe.generate.batch_size)
    return _generate(answers, shown, recipe, prompts, out, about, total, skipped)


def run_generate_by_servers(
    recipe: Recipe,
    prompts: Callable[[int], Iterable[Conversation | None]],
    out: Path,
    urls: Sequence[str],
    model: str | None,
    api_key: str | None,
    total: int | None = None,
    skipped: SkippedRows | None = None,
) -> GenerateReport:
    """Stage 1 where servers answer: of the target only the tokenizer is loaded."""
    tokenizer = load_tokenizer(recipe.target.path, recipe.target.revision)
    shown = prompt_format(recipe, tokenizer, (read_manifest(out) or {}).get("today"))
    with doing(f"looking at {', '.join(urls)}"):
        answers = ServerAnswers(urls, shown, recipe.generate.batch_size, model, api_key)
    about = made_with(shown, f"{answers.model} at a server", (), recipe.generate)
    return _generate(answers, shown, recipe, prompts, out, about, total, skipped)


def _generate(
    answers: Answers,
    shown: PromptFormat,
    recipe: Recipe,
    prompts: Callable[[int], Iterable[Conversation | None]],
    out: Path,
    about: dict[str, Any],
    total: int | None,
    skipped: SkippedRows | None,
) -> GenerateReport:
    """Generate, and tell the progress; of `total` conversations those that are there already count as
    done."""
    before = SharedWork(out).count()
    if total is not None and before > total:
        print(f"{out}: holds {before} answers already; those to these prompts are added", file=sys.stderr)
        before = 0  # how many of them are to these is not known
    made, done, began = 0, 0, time.perf_counter()
    with progress_bar("generate", total, done=before) as bar:

        def tick(conversations: int, tokens: int) -> None:
            nonlocal made, done
            made, done = made + tokens, done + conversations
            rate = made / (time.perf_counter() - began)
            note = f"{made:,} tokens, {rate:,.0f} tokens/s"
            if total and not done and rate:  # nobody knows yet how long answers are
                most = (total - before) * recipe.generate.max_new_tokens - made
                note += f", at most {clock(most / rate)} left"
            bar.update(advance=conversations, note=note)

        return generate_file(answers, shown, prompts, out, recipe.generate, about, tick, skipped)


def feature_layers(recipe: Recipe, target: TargetWeights) -> tuple[int, ...]:
    """The target layers that the drafter listens to."""
    chosen = recipe.drafter.feature_layers
    return (
        tuple(chosen)
        if chosen
        else algorithm_named(recipe.drafter.algorithm).taps(
            recipe.drafter.num_features, target.info.num_layers
        )
    )


class Walks:
    """Conversations that can be read more than once, from their files, and about how many they are."""

    def __init__(self, read: Callable[[], Iterable[Conversation]], count: int | None) -> None:
        self._read, self._count = read, count

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self._read())

    def __length_hint__(self) -> int:
        return self._count or 0


def answers_of(
    recipe: Recipe, tokenizer: Any, paths: Sequence[Path], skipped: SkippedRows | None = None
) -> Walks:
    """The conversations of some files, records of `generate` among them; what is wrong with a row, and what
    the chat template refuses, goes into `skipped`, where it is given. Raises DataError for records that were
    made with another template, tokenizer or other template switches than the recipe has."""
    shown = prompt_format(recipe, tokenizer)
    for path in paths:
        check_rendered_as(path, shown)
    rows, switches = count_rows(paths), deepseek_v4_switches(recipe.target)
    if skipped is None:
        return Walks(lambda: iterate_conversations(paths, None, switches), rows)
    return Walks(
        lambda: learnt_ones(iterate_conversations(paths, skipped.anew(), switches), shown, skipped), rows
    )


def run_export(
    folder: Path,
    out: Path,
    form: str,
    dtype: str,
    target_path: str | None,
    borrow: bool,
    rows: bool = False,
    overwrite: bool = False,
) -> int:
    """Write a drafter's folder again, in another form or dtype, with or without the target's weights; bytes
    of weights.

    Raises CheckpointError when the form cannot hold it, ConfigError for an unknown dtype, one folder for
    both, or one that holds weights and is not to be overwritten.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: is not known, choose one of {', '.join(DTYPES)}")
    if form in (BUNDLED, SUBFOLDER):
        return hand_over_module(folder, out, form).bytes
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--out {out}: is the drafter's own folder, choose another")
    if (borrow or rows) and target_path is None:
        raise ConfigError("--borrow: needs the --target that lends embedding and head")
    check_free(out, WEIGHTS, INDEX, overwrite=overwrite)
    make_folder(out)
    target = TargetFiles(target_path) if target_path else None
    drafter = open_drafter(folder, target, DTYPES["float32"]) if target else load_drafter(folder)
    own = ("draftkit", "algorithm", "sha256", "config_sha256", "digest")
    note = {k: v for k, v in read_provenance(folder).items() if k not in own}
    save_drafter(drafter, out, note, DTYPES[dtype], form, target if borrow or rows else None, rows)
    return (out / WEIGHTS).stat().st_size


def check_drafter_switches(recipe: Recipe, drafter: Path) -> None:
    """Raise ConfigError when a drafter was trained with other template switches than the recipe has."""
    trained = read_provenance(drafter).get("template_switches")
    if trained is not None and trained != recipe.target.template_switches:
        raise ConfigError(
            f"{drafter}: was trained with template switches {trained}, the recipe has "
            f"{recipe.target.template_switches}; "
            "give the same in target.template_switches"
        )


def read_prompts(paths: Sequence[Path], recipe: Recipe | None = None) -> list[Conversation]:
    """Prompts of one or more files, for the recipe's target where it is known."""
    switches = deepseek_v4_switches(recipe.target) if recipe else None
    return list(iterate_conversations(paths, None, switches))

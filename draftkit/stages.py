"""The stages of the pipeline, each from files to files, as the command line and the quickstart run them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from draftkit.config import Recipe, dump_recipe
from draftkit.data.capture import CaptureReport, CaptureSettings, capture
from draftkit.data.conversations import Conversation, read_conversations
from draftkit.data.draft_vocabulary import choose_draft_vocabulary, count_answer_tokens, count_tokens
from draftkit.data.features import FeatureStore
from draftkit.data.generate import Answerer, GenerateSettings, generate_file
from draftkit.data.mask_token import choose_mask_token
from draftkit.data.template import render_prompt
from draftkit.draft.algorithms import algorithm_named
from draftkit.draft.checkpoint import WEIGHTS, load_drafter, new_drafter, open_drafter, read_provenance, save_drafter
from draftkit.draft.drafter import Drafter, DrafterShape
from draftkit.draft.families import block_shape, style_of
from draftkit.draft.warm_start import CapturedText
from draftkit.engine.answers import answerer
from draftkit.errors import ConfigError
from draftkit.evaluate.metrics import domains_of
from draftkit.evaluate.run import EvalPrompt, EvalResult, environment, evaluate, speed_prompts
from draftkit.ops.sampling import Sampling
from draftkit.output import as_json, make_folder, one_writer, write_text
from draftkit.target.fingerprint import fingerprint
from draftkit.target.interface import Target, TargetWeights
from draftkit.target.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from draftkit.target.transformers import (
    DTYPES,
    EMBEDDED,
    TransformersTarget,
    best_device,
    load_target,
    spread_feature_layers,
)
from draftkit.target.weights import TargetFiles
from draftkit.train import trainer
from draftkit.train.parallel import join_world
from draftkit.train.trainer import TrainReport

START_TOKENS = 4096  # that the fitted parts of a start are fitted to: thousands of vectors for each number
TINY_PROMPTS, TINY_HELD_OUT = EMBEDDED / "prompts.jsonl", EMBEDDED / "heldout.jsonl"


@contextmanager
def progress_bar(title: str, total: float) -> Iterator[tuple[Progress, Any]]:
    """A bar with rate and remaining time on standard error; on a pipe it stays silent."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()
    ) as bar:
        yield bar, bar.add_task(title, total=total, note="")


def open_target(recipe: Recipe, device: str | None = None) -> tuple[TransformersTarget, Any]:
    """The recipe's target and its tokenizer; without a device, on a GPU where there is one."""
    section = recipe.target
    algorithm_named(recipe.drafter.algorithm)  # a mistake shows before the target is loaded
    target = load_target(section.path, section.revision, section.dtype, device or best_device())
    return target, load_tokenizer(section.path, section.revision)


def read_target(recipe: Recipe) -> tuple[TargetFiles, Any]:
    """What the files of the recipe's target say, and its tokenizer; the model is not loaded."""
    section = recipe.target
    algorithm_named(recipe.drafter.algorithm)
    return TargetFiles(section.path, section.revision, section.dtype), load_tokenizer(section.path, section.revision)


def run_generate(
    target: TransformersTarget,
    tokenizer: Any,
    recipe: Recipe,
    prompts: Sequence[Conversation],
    out: Path,
    answer: Answerer | None = None,
) -> int:
    """Stage 1: the target answers the prompts, by `answer` where one is at hand."""
    section = recipe.generate
    settings = GenerateSettings(
        Sampling(section.temperature, section.top_k, section.top_p),
        section.max_new_tokens,
        section.batch_size,
        section.seed,
    )
    made, began = 0, time.perf_counter()
    with progress_bar("generate", len(prompts)) as (bar, task):

        def tick(answers: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            bar.update(task, advance=answers, note=f"{made / (time.perf_counter() - began):,.0f} tokens/s")

        return generate_file(target, tokenizer, prompts, out, settings, answer or answerer(target, section.batch_size), tick)


def feature_layers(recipe: Recipe, target: TargetWeights) -> tuple[int, ...]:
    """The target layers that the drafter listens to."""
    chosen = recipe.drafter.feature_layers
    return tuple(chosen) if chosen else spread_feature_layers(recipe.drafter.num_features, target.info.num_layers)


@one_writer()
def run_capture(
    target: TransformersTarget, tokenizer: Any, recipe: Recipe, conversations: Sequence[Conversation], out: Path
) -> CaptureReport:
    """Stage 2: the target reads the conversations into a feature store."""
    section = recipe.capture
    settings = CaptureSettings(feature_layers(recipe, target), section.max_length, section.batch_tokens, section.dtype)
    with progress_bar("capture", len(conversations)) as (bar, task):
        return capture(
            target, tokenizer, conversations, out, settings, lambda n: bar.update(task, advance=n)
        )


def drafter_config(
    recipe: Recipe, target: TargetWeights, tokenizer: Any, store: FeatureStore | None = None
) -> DrafterShape:
    """The drafter's shape: the recipe's choices, the target's sizes, and a mask token that the data in `store` does not use."""
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
    }
    if section.intermediate_size:
        sizes["intermediate_size"] = section.intermediate_size
    vocab, mask = target.info.vocab_size, 0
    if algorithm.masks:
        count = lambda: count_tokens(store, vocab) if store else torch.zeros(vocab, dtype=torch.int64)  # noqa: E731
        mask = choose_mask_token(tokenizer, vocab, section.mask_token_id, count)
    return algorithm.shape(section, sizes, mask)


@one_writer()
def run_train(
    target: TargetWeights,
    tokenizer: Any,
    recipe: Recipe,
    features: Path,
    out: Path,
    model: Callable[[], Target] | None = None,
) -> TrainReport:
    """Stage 3: a drafter is trained on the feature store, which must match target, layers, template and tokenizer.

    Nothing but the answers for the log (`train.decode_prompts`) needs the model itself: `model` gives it, null loads it then.
    Where several processes train together there are no such answers, and none of them loads it.
    """
    store = FeatureStore(features)
    layers = feature_layers(recipe, target)
    store.check_matches(target.info.fingerprint, layers, template_hash(tokenizer), tokenizer_hash(tokenizer))
    drafter = new_drafter_for(recipe, target, tokenizer, store)
    provenance = {
        "target": target.info.name,
        "target_fingerprint": target.info.fingerprint,
        "template_hash": template_hash(tokenizer),
        "recipe": recipe.model_dump(),
    }
    with progress_bar("train", 100) as (bar, task), join_world() as world:

        def show(p: trainer.Progress) -> None:
            note = f"% step {p.step}  {p.step / max(p.seconds, 1e-9):.1f} steps/s  loss {p.loss:.3f}"
            note += f"  accepted length {p.accepted_len:.2f}" if p.accepted_len else ""
            bar.update(task, completed=int(100 * p.share), note=note)

        def note_recipe() -> None:
            write_text(out / "recipe.yaml", dump_recipe(recipe))

        load = model or (lambda: open_target(recipe)[0])
        start = f"{recipe.drafter.start} {recipe.drafter.start_layers}"
        return trainer.train(store, drafter, load, out, recipe.train, provenance, world, show, note_recipe, start)


def new_drafter_for(
    recipe: Recipe, target: TargetWeights, tokenizer: Any, store: FeatureStore | None = None
) -> Drafter:
    """A fresh drafter, seeded by the recipe, on the target's embedding and head.

    A reduced draft vocabulary holds the most frequent tokens of the answers in `store`.
    """
    torch.manual_seed(recipe.train.seed)
    config, ids_W = drafter_config(recipe, target, tokenizer, store), None
    if config.draft_vocab_size and store is not None:
        ids_W = choose_draft_vocabulary(count_answer_tokens(store, config.vocab_size), config.draft_vocab_size)
    drafter = new_drafter(config, target.embedding_weight(), target.head_weight(), ids_W)
    if recipe.drafter.start == "target":
        start = algorithm_named(recipe.drafter.algorithm).start
        if start is None:
            raise ConfigError(f"drafter.start: target is for dspark and dflash; {recipe.drafter.algorithm} begins at random")
        text = _some_text(store) if store is not None else None
        start(drafter, list(target.layers), target.final_norm(), recipe.drafter.start_layers, text)
    return drafter


def _some_text(store: FeatureStore) -> CapturedText:
    """The first conversations of a store, about START_TOKENS tokens of them."""
    samples, tokens = [], 0
    for index in range(len(store)):
        samples.append(store[index])
        tokens += len(samples[-1].tokens_T)
        if tokens >= START_TOKENS:
            break
    return CapturedText(torch.cat([s.tokens_T for s in samples]), torch.cat([s.features_TF for s in samples]))


def run_export(folder: Path, out: Path, form: str, dtype: str, target_path: str | None, borrow: bool) -> int:
    """Write a drafter's folder again, in another form or dtype, with or without the target's weights; bytes of weights.

    Raises CheckpointError when the form cannot hold it, ConfigError for an unknown dtype, or one folder for both.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: is not known, choose one of {', '.join(DTYPES)}")
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--out {out}: is the drafter's own folder, choose another")
    if borrow and target_path is None:
        raise ConfigError("--borrow: needs the --target that lends embedding and head")
    make_folder(out)
    target = TargetFiles(target_path) if target_path else None
    drafter = open_drafter(folder, target, DTYPES["float32"]) if target else load_drafter(folder)
    own = ("draftkit", "algorithm", "sha256", "config_sha256", "digest")
    note = {k: v for k, v in read_provenance(folder).items() if k not in own}
    save_drafter(drafter, out, note, DTYPES[dtype], form, target if borrow else None)
    return (out / WEIGHTS).stat().st_size


def first_turns(tokenizer: Any, prompts: Sequence[Conversation], per_domain: int) -> list[EvalPrompt]:
    """The first prompts of every domain, rendered; of a conversation the first turn only, and the table says so."""
    chosen: list[EvalPrompt] = []
    counts: dict[str, int] = {}
    for p in prompts:
        counts[p.domain] = counts.get(p.domain, 0) + 1
        if counts[p.domain] <= per_domain:
            chosen.append(EvalPrompt(p.id, p.domain, render_prompt(tokenizer, p.first_turn().as_dicts(), p.id)))
    return chosen


@one_writer()
def run_evaluate(
    target: TransformersTarget,
    tokenizer: Any,
    recipe: Recipe,
    drafter: Path,
    prompts: Sequence[Conversation],
    out: Path,
    threads: int | None = None,
) -> list[EvalResult]:
    """Stage 4: accepted length and speed, once per temperature, on the first prompts of every domain.

    Each result is written into `out` at once. One that is there already, of the same pair, prompts, settings and machine, is
    kept, and a line on standard error says so.
    """
    section, opened = recipe.evaluate, open_drafter(drafter, target)
    if threads:
        torch.set_num_threads(threads)
    chosen = first_turns(tokenizer, prompts, section.prompts_per_domain)
    here = {name: value for name, value in environment(target.device).items() if name != "time"}
    made_with = json.dumps([target.info.fingerprint, fingerprint(drafter), [asdict(p) for p in chosen], here])
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for temperature in section.temperatures:
        sampling = Sampling(temperature)
        path = out / f"evaluate-T{temperature:g}.json"
        made_from = hashlib.sha256(f"{made_with} {section} {sampling}".encode()).hexdigest()
        result = _kept_result(path, made_from)
        if result is None:
            timed = sum(map(len, speed_prompts(chosen, section.speed_prompts).values()))
            with progress_bar(f"evaluate T={temperature:g}", len(chosen) + timed) as (bar, task):
                tick = lambda: bar.update(task, advance=1)  # noqa: E731
                result = evaluate(target, opened, chosen, section, sampling, tick)
            result = replace(result, settings=result.settings | {"made_from": made_from})
            result.save(path)
        results.append(result)
    return results


def _kept_result(path: Path, made_from: str) -> EvalResult | None:
    """The result that an earlier run left, if it is of the same evaluation; another one will be written over."""
    if not path.exists():
        return None
    result = EvalResult.load(path)
    if result.settings.get("made_from") != made_from:
        return None
    print(f"{path}: is this very evaluation and stays; remove it to measure again", file=sys.stderr)
    return result


def read_prompts(paths: Sequence[Path]) -> list[Conversation]:
    """Prompts of one or more files."""
    return read_conversations(paths)


def summary(results: Sequence[EvalResult]) -> str:
    """The aggregates of evaluations as JSON, for `--json`."""
    rows = [
        {
            "temperature": r.settings["sampling"]["temperature"],
            "accepted_len": {k: v.value for k, v in r.accepted_len.items()},
            "speed": {k: asdict(v) for k, v in r.speed.items()},
            "prompts": len(r.records),
            "domains": domains_of(r.records),
        }
        for r in results
    ]
    return as_json(rows, indent=1)

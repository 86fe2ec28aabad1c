"""The stages of the pipeline, each from files to files, as the command line and the quickstart run them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from draftkit.config import Recipe, dump_recipe
from draftkit.data.answers import Answers
from draftkit.data.conversations import SkippedRows, iterate_conversations, read_conversations
from draftkit.data.generate import GenerateReport, generate_file
from draftkit.data.mask_token import choose_mask_token
from draftkit.data.messages import Conversation
from draftkit.data.parts import SharedWork
from draftkit.data.records import check_rendered_as, made_with, read_manifest
from draftkit.data.refused import asked_ones, learnt_ones
from draftkit.data.samples import naming_conversation
from draftkit.data.servers import ServerAnswers
from draftkit.data.traces import domain_of
from draftkit.draft.algorithms import algorithm_named
from draftkit.draft.checkpoint import load_drafter, new_drafter, open_drafter, save_drafter
from draftkit.draft.checkpoint_files import INDEX, WEIGHTS, read_provenance
from draftkit.draft.drafter import Drafter, DrafterShape
from draftkit.draft.families import block_shape, style_of
from draftkit.draft.warm_start import CapturedText
from draftkit.engine.answers import answerer
from draftkit.errors import ConfigError
from draftkit.evaluate.metrics import domains_of
from draftkit.evaluate.run import EvalPrompt, EvalResult, environment, evaluate, speed_prompts
from draftkit.features.draft_vocabulary import choose_draft_vocabulary, count_answer_tokens, count_tokens
from draftkit.features.source import FeatureSource
from draftkit.handover.deepseek_v4 import BUNDLED, SUBFOLDER, hand_over_module
from draftkit.ops.sampling import Sampling
from draftkit.output import as_json, check_free, make_folder, one_writer, write_text
from draftkit.progress import clock, doing, progress_bar
from draftkit.target.fingerprint import fingerprint
from draftkit.target.formats import format_of
from draftkit.target.interface import Target, TargetWeights
from draftkit.target.place import EMBEDDED
from draftkit.target.prompt_format import PromptFormat, RewrittenError, TemplateError
from draftkit.target.tokenizer import load_tokenizer, template_hash
from draftkit.target.transformers import (
    DTYPES,
    TransformersTarget,
    best_device,
    load_target,
)
from draftkit.target.weights import TargetFiles
from draftkit.train import trainer
from draftkit.train.parallel import join_world
from draftkit.train.trainer import TrainReport

START_TOKENS = 4096  # that the fitted parts of a start are fitted to: thousands of vectors for each number
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
    prompts: Callable[[int], Iterable[Conversation]],
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
    prompts: Callable[[int], Iterable[Conversation]],
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
    prompts: Callable[[int], Iterable[Conversation]],
    out: Path,
    about: dict[str, Any],
    total: int | None,
    skipped: SkippedRows | None,
) -> GenerateReport:
    """Generate, and tell the progress; of `total` conversations those that are there already count as
    done."""
    read = prompts
    if skipped is not None:
        read = lambda first: islice(asked_ones(prompts(0), shown, skipped), first, None)  # noqa: E731
    before = SharedWork(out).count()
    made, done, began = 0, 0, time.perf_counter()
    with progress_bar("generate", total) as bar:
        bar.update(completed=before)

        def tick(conversations: int, tokens: int) -> None:
            nonlocal made, done
            made, done = made + tokens, done + conversations
            rate = made / (time.perf_counter() - began)
            note = f"{made:,} tokens, {rate:,.0f} tokens/s"
            if total and not done and rate:  # nobody knows yet how long answers are
                most = (total - before) * recipe.generate.max_new_tokens - made
                note += f", at most {clock(most / rate)} left"
            bar.update(advance=conversations, note=note)

        return generate_file(answers, shown, read, out, recipe.generate, about, tick)


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
    """Conversations that can be read more than once, from their files."""

    def __init__(self, read: Callable[[], Iterable[Conversation]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self._read())


def answers_of(
    recipe: Recipe, tokenizer: Any, paths: Sequence[Path], skipped: SkippedRows | None = None
) -> Walks:
    """The conversations of some files, records of `generate` among them; what is wrong with a row, and what
    the chat template refuses, goes into `skipped`, where it is given. Raises DataError for records that were
    made with another template, tokenizer or other template switches than the recipe has."""
    shown = prompt_format(recipe, tokenizer)
    for path in paths:
        check_rendered_as(path, shown)
    if skipped is None:
        return Walks(lambda: iterate_conversations(paths))
    return Walks(lambda: learnt_ones(iterate_conversations(paths, skipped.anew()), shown, skipped))


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
    with progress_bar("train", 100) as bar, join_world() as world:

        def show(p: trainer.Progress) -> None:
            note = f"% step {p.step}  {p.step / max(p.seconds, 1e-9):.1f} steps/s  loss {p.loss:.3f}"
            note += f"  accepted length {p.accepted_len:.2f}" if p.accepted_len else ""
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
    free = {"max_length", "rope_scaling"}  # those of the drafter stay
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


def first_turns(shown: PromptFormat, prompts: Sequence[Conversation], per_domain: int) -> list[EvalPrompt]:
    """The first prompts of every domain, rendered; of a conversation the first turn only, and the table says
    so."""
    chosen: list[EvalPrompt] = []
    counts: dict[str, int] = {}
    for p in prompts:
        counts[p.domain] = counts.get(p.domain, 0) + 1
        if counts[p.domain] <= per_domain:
            with naming_conversation(p.id):
                tokens = shown.prompt(p.first_turn().as_dicts(), p.tools)
            chosen.append(EvalPrompt(p.id, p.domain, tokens))
    return chosen


def every_turn(
    shown: PromptFormat, conversations: Iterable[Conversation], per_domain: int, room: int
) -> list[EvalPrompt]:
    """The prompt before every answer of recorded conversations, the first of each domain; domains are those
    of the answers. Prompts of more than `room` tokens are left out, and conversations whose answers cannot be
    found."""
    chosen: list[EvalPrompt] = []
    counts: dict[str, int] = {}
    for conversation in conversations:
        try:
            turns = shown.turns(conversation.as_dicts(), conversation.tools)
        except (RewrittenError, TemplateError):
            continue
        for number, turn in enumerate(turns):
            said = shown.parse(turn.answer_ids).message()
            domain = domain_of([said])
            counts[domain] = counts.get(domain, 0) + 1
            if counts[domain] <= per_domain and len(turn.prompt_ids) <= room:
                chosen.append(EvalPrompt(f"{conversation.id}#{number}", domain, turn.prompt_ids))
    return chosen


def check_drafter_switches(recipe: Recipe, drafter: Path) -> None:
    """Raise ConfigError when a drafter was trained with other template switches than the recipe has."""
    trained = read_provenance(drafter).get("template_switches")
    if trained is not None and trained != recipe.target.template_switches:
        raise ConfigError(
            f"{drafter}: was trained with template switches {trained}, the recipe has "
            f"{recipe.target.template_switches}; "
            "give the same in target.template_switches"
        )


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
    """Stage 4: accepted length and speed, once per temperature, on the first prompts of every domain, by all
    processes that torchrun started. The first one writes and measures the speed; the others return nothing.

    Each result is written into `out` at once. One that is there already, of the same pair, prompts, settings
    and machine, is kept, and a line on standard error says so.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = first_turns(prompt_format(recipe, tokenizer), prompts, recipe.evaluate.prompts_per_domain)
    return evaluate_prompts(target, recipe, drafter, chosen, out)


def evaluate_prompts(
    target: TransformersTarget, recipe: Recipe, drafter: Path, chosen: Sequence[EvalPrompt], out: Path
) -> list[EvalResult]:
    """`run_evaluate` on prompts that are rendered already."""
    check_drafter_switches(recipe, drafter)
    section, opened = recipe.evaluate, open_drafter(drafter, target)
    here = {name: value for name, value in environment(target.device).items() if name != "time"}
    made_with = json.dumps([target.info.fingerprint, fingerprint(drafter), [asdict(p) for p in chosen], here])
    out.mkdir(parents=True, exist_ok=True)
    results = []
    with join_world() as world:
        for temperature in section.temperatures:
            sampling = Sampling(temperature)
            path = out / f"evaluate-T{temperature:g}.json"
            made_from = hashlib.sha256(f"{made_with} {section} {sampling}".encode()).hexdigest()
            result = kept_result(path, made_from) if world.first else None
            if not world.from_first(float(result is not None)):  # the others wait here for the speed, too
                timed = sum(map(len, speed_prompts(chosen, section.speed_prompts).values()))
                share = len(range(world.rank, len(chosen), world.size)) + timed * world.first
                with progress_bar(f"evaluate T={temperature:g}", share) as bar:
                    tick = lambda: bar.update(advance=1)  # noqa: E731
                    result = evaluate(target, opened, chosen, section, sampling, tick, world)
                result = replace(result, settings=result.settings | {"made_from": made_from})
                if world.first:
                    result.save(path)
            if world.first and result is not None:
                results.append(result)
    return results


def kept_result(path: Path, made_from: str) -> EvalResult | None:
    """The result that an earlier run left, if it is of the same evaluation; another one will be written
    over."""
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
            "accepted_len_95": {k: (v.low, v.high) for k, v in r.accepted_len.items()},
            "acceptance_by_position": r.acceptance,
            "speed": {k: asdict(v) for k, v in r.speed.items()},
            "prompts": len(r.records),
            "domains": domains_of(r.records),
        }
        for r in results
    ]
    return as_json(rows, indent=1)

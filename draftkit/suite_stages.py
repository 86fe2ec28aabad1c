"""Evaluating a pair on a suite of benchmark prompts, from files to files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftkit.config import Recipe
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import Drafter
from draftkit.errors import ConfigError, DataError
from draftkit.evaluate.run import EvalPrompt, EvalResult, result_of, speed_prompts
from draftkit.evaluate.speed import measure_speed
from draftkit.evaluate.suite_run import SuiteRecord, answer_suite, in_order, skipped_by_set
from draftkit.evaluate.suites import AskedRow, read_suite
from draftkit.evaluate_stages import kept_result
from draftkit.ops.sampling import Sampling
from draftkit.progress import progress_bar
from draftkit.stages import check_drafter_switches, prompt_format
from draftkit.target.fingerprint import fingerprint
from draftkit.target.prompt_format import PromptFormat
from draftkit.target.template_format import TemplateFormat
from draftkit.target.transformers import TransformersTarget
from draftkit.train.parallel import World, join_world


def run_suite(
    target: TransformersTarget,
    tokenizer: Any,
    recipe: Recipe,
    drafter: Path,
    folder: Path,
    out: Path,
    limit: int | None = None,
) -> list[EvalResult]:
    """Answers to all sets of a folder, once per temperature, by all processes that torchrun started. The
    first one writes `evaluate-T*.json` and measures the speed; the others return nothing.

    Raises ConfigError when the template can think and the recipe does not say whether it shall, DataError
    for a folder without sets, or whose prompts all leave no room.
    """
    check_drafter_switches(recipe, drafter)
    shown = prompt_format(recipe, tokenizer)
    check_thinking(shown)
    sets, opened = read_suite(folder, limit), open_drafter(drafter, target)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    with join_world() as world:
        for temperature in recipe.evaluate.temperatures:
            path = out / f"evaluate-T{temperature:g}.json"
            made_from = _made_from(recipe, target, drafter, sets, temperature)
            result = kept_result(path, made_from) if world.first else None
            if not world.from_first(float(result is not None)):
                result = _answered(target, opened, shown, sets, recipe, Sampling(temperature), world)
                result = replace(result, settings=result.settings | {"made_from": made_from})
                if world.first:
                    result.save(path)
            if world.first and result is not None:
                results.append(result)
    return results


def check_thinking(shown: PromptFormat) -> None:
    """Raise ConfigError when the template has a thinking switch that nobody set: the paper's protocol does
    not think, and acceptance depends on it."""
    for name in ("enable_thinking", "thinking"):
        if isinstance(shown, TemplateFormat) and shown.mentions(name) and name not in shown.switches:
            raise ConfigError(
                "--suite paper: the chat template can think and the recipe does not say whether it "
                "shall; the paper's "
                f"protocol is --set 'target.template_switches={{{name}: false}}'"
            )


def _answered(
    target: TransformersTarget,
    drafter: Drafter,
    shown: PromptFormat,
    sets: dict[str, list[AskedRow]],
    recipe: Recipe,
    sampling: Sampling,
    world: World,
) -> EvalResult:
    section = recipe.evaluate
    mine = sum(len(row.turns) for rows in sets.values() for row in rows[world.rank :: world.size])
    with progress_bar(f"suite T={sampling.temperature:g}", mine) as bar:
        tick = lambda: bar.update(advance=1)  # noqa: E731
        own = answer_suite(target, drafter, shown, sets, section, sampling, world.rank, world.size, tick)
    records: list[SuiteRecord] = in_order(world.collect(own), list(sets))
    answered = [one.record for one in records if one.record is not None]
    if not answered:
        raise DataError(
            f"none of {len(records)} prompts leaves room for {section.max_new_tokens} tokens of answer "
            "within the "
            f"target's {target.info.max_length}; lower evaluate.max_new_tokens"
        )
    timed = _timed(
        shown, sets, section.speed_prompts, target.info.max_length - section.max_new_tokens - drafter.gamma
    )
    speed = measure_speed(target, drafter, timed, sampling, section.max_new_tokens) if world.first else {}
    result = result_of(target, answered, section, sampling, speed)
    return replace(result, settings=result.settings | {"suite": "paper", "skipped": skipped_by_set(records)})


def _timed(
    shown: PromptFormat, sets: dict[str, list[AskedRow]], each: int, room: int
) -> dict[str, list[tuple[int, ...]]]:
    """The first questions of every set that leave room, for the speed."""
    found = [
        EvalPrompt(f"{name}-{row.line}", name, shown.prompt([{"role": "user", "content": row.turns[0]}]))
        for name, rows in sets.items()
        for row in rows[: 4 * each]
    ]
    return speed_prompts([p for p in found if len(p.tokens) <= room], each)


def _made_from(
    recipe: Recipe,
    target: TransformersTarget,
    drafter: Path,
    sets: dict[str, list[AskedRow]],
    temperature: float,
) -> str:
    parts = [target.info.fingerprint, fingerprint(drafter), recipe.evaluate, recipe.target, temperature, sets]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def say_skipped(results: Sequence[EvalResult]) -> None:
    """One line on standard error for prompts that were too long."""
    for result in results[:1]:
        if skipped := result.settings.get("skipped"):
            counts = ", ".join(f"{count} of {name}" for name, count in skipped.items())
            print(f"too long for this target, skipped: {counts}", file=sys.stderr)

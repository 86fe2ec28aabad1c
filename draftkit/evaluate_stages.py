"""Evaluating as a stage: from prompts to accepted lengths and speed."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from draftkit.config import Recipe
from draftkit.data.messages import Conversation
from draftkit.data.samples import naming_conversation
from draftkit.data.traces import domain_of
from draftkit.draft.checkpoint import open_drafter
from draftkit.evaluate.metrics import domains_of
from draftkit.evaluate.run import EvalPrompt, EvalResult, environment, evaluate
from draftkit.ops.sampling import Sampling
from draftkit.output import as_json, one_writer
from draftkit.progress import progress_bar
from draftkit.stages import check_drafter_switches, prompt_format
from draftkit.target.fingerprint import fingerprint
from draftkit.target.prompt_format import PromptFormat, RewrittenError, TemplateError
from draftkit.target.transformers import TransformersTarget
from draftkit.train.parallel import join_world


def first_turns(shown: PromptFormat, prompts: Sequence[Conversation], per_domain: int) -> list[EvalPrompt]:
    """The first prompts of every domain, rendered; of a conversation the first turn only, and the table says
    so (`Conversation.measured`)."""
    chosen: list[EvalPrompt] = []
    counts: dict[str, int] = {}
    for p in prompts:
        counts[p.domain] = counts.get(p.domain, 0) + 1
        if counts[p.domain] <= per_domain:
            with naming_conversation(p.id):
                tokens = shown.prompt(p.measured().as_dicts(), p.tools)
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
            said = shown.parse(turn.answer_ids, turn.prompt_ids).message()
            domain = domain_of([said])
            counts[domain] = counts.get(domain, 0) + 1
            if counts[domain] <= per_domain and len(turn.prompt_ids) <= room:
                chosen.append(EvalPrompt(f"{conversation.id}#{number}", domain, turn.prompt_ids))
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
                share = len(range(world.rank, len(chosen), world.size))
                with progress_bar(f"evaluate T={temperature:g}", share) as bar:
                    result = evaluate(target, opened, chosen, section, sampling, bar, world)
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

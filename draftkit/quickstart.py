"""The whole path in one command: every stage is skipped when its output is already there and valid."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from draftkit import stages
from draftkit.config import Recipe, dump_recipe
from draftkit.draft.checkpoint import open_drafter, read_provenance
from draftkit.engine.answers import answerer
from draftkit.evaluate.plots import plot_acceptance
from draftkit.evaluate.report import print_report
from draftkit.evaluate.run import EvalResult
from draftkit.target.transformers import TransformersTarget

GENERATE_SHARE, EVALUATE_SHARE = 0.14, 0.12  # of the minutes; training gets what capture leaves of the rest,
TRAIN_SHARE = 0.25  # but no less than this
PROBE_PROMPTS = 192  # answered first; their rate decides how many follow
PROMPTS_PER_DOMAIN, SPEED_PROMPTS = 4, 0.5  # evaluated at each temperature, per minute of the whole


@dataclass(frozen=True)
class StageTime:
    """How long a stage took and what it says."""

    name: str
    seconds: float
    note: str


def run_quickstart(recipe: Recipe, out: Path, minutes: float, as_json: bool = False) -> None:
    """Run all stages into `out`, in about `minutes` minutes, and print the table and what to type next."""
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    recipe = _evaluated_within(recipe, minutes)
    answers, features, run, results_folder = out / "answers.jsonl", out / "features", out / "drafter", out / "results"
    times: list[StageTime] = []

    @contextmanager
    def stage(name: str) -> Iterator[list[str]]:
        notes: list[str] = []
        began = time.perf_counter()
        yield notes
        times.append(StageTime(name, time.perf_counter() - began, "; ".join(notes)))
        console.print(f"[bold]{name}[/bold]: {times[-1].note} ({times[-1].seconds:.0f} s)")

    with stage("target") as notes:
        target, tokenizer = stages.open_target(recipe)
        info = target.info
        notes.append(f"{info.name}: {info.num_layers} layers, hidden size {info.hidden_size}, vocabulary {info.vocab_size}")
    with stage("generate") as notes:
        notes.append(f"{_generate(target, tokenizer, recipe, answers, minutes)} answers of the target itself")
    with stage("capture") as notes:
        report = stages.run_capture(target, tokenizer, recipe, stages.read_prompts([answers]), features)
        notes.append(f"features of {report.tokens:,} tokens")
    with stage("train") as notes:
        left = minutes * (1 - EVALUATE_SHARE) - sum(t.seconds for t in times) / 60
        recipe = _trained_within(recipe, _once(out, "train_minutes", lambda: max(minutes * TRAIN_SHARE, left)))
        if (run / "done.json").exists() and _same_recipe(run, recipe):
            notes.append(f"a drafter from this recipe is already there: {run / 'best'}")
        else:
            trained = stages.run_train(target, tokenizer, recipe, features, run)
            (run / "done.json").write_text(json.dumps(asdict(trained), indent=1), encoding="utf-8")
            notes.append(f"{trained.steps} steps, simulated accepted length {trained.best:.2f}")
    with stage("evaluate") as notes:
        results = _evaluate(target, tokenizer, recipe, run / "best", results_folder)
        plot_acceptance(results, results_folder / "acceptance.png")
        notes.append(f"{len(results[0].records)} held-out prompts at {len(results)} temperatures")

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    measured = {"stages": [asdict(t) for t in times], "peak_gib": peak}
    (out / "times.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
    if as_json:
        print(stages.summary(results))
        return
    console.print()
    print_report(results)
    total = sum(t.seconds for t in times)
    console.print(f"{total / 60:.1f} minutes in all, peak memory {peak:.2f} GiB")
    console.print(f"acceptance by position: {results_folder / 'acceptance.png'}")
    console.print(NEXT.format(drafter=run / "best"), highlight=False)


NEXT = """
What to type next:
  draftkit serve --drafter {drafter}
    (an OpenAI-compatible server and a chat page on http://127.0.0.1:8000)
and on your own conversations:
  draftkit generate -p your_prompts.jsonl -o answers.jsonl
  draftkit capture -c answers.jsonl -o features
  draftkit train -f features -o drafter
"""


def _trained_within(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with a training of so many minutes."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"minutes": minutes, "epochs": 1000})})


def _evaluated_within(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with an evaluation that fits the minutes of the whole."""
    evaluate = recipe.evaluate.model_copy(
        update={
            "prompts_per_domain": max(1, round(PROMPTS_PER_DOMAIN * minutes)),
            "speed_prompts": max(3, round(SPEED_PROMPTS * minutes)),
        }
    )
    return recipe.model_copy(update={"evaluate": evaluate})


def _once(out: Path, name: str, decide: Callable[[], float]) -> float:
    """What was decided when this was first asked: kept, so that a second run goes on with the same."""
    path = out / "plan.json"
    plan = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if name not in plan:
        plan[name] = decide()
        path.write_text(json.dumps(plan), encoding="utf-8")
    return float(plan[name])


def _generate(target: TransformersTarget, tokenizer: Any, recipe: Recipe, answers: Path, minutes: float) -> int:
    """Answer as many prompts as the generation's share of the time allows, measured once on the first of them."""
    answer = answerer(target, recipe.generate.batch_size)  # its code is built here, outside the measured rate
    prompts = stages.read_prompts([stages.TINY_PROMPTS])

    def first(count: float) -> int:
        return stages.run_generate(target, tokenizer, recipe, prompts[: int(count)], answers, answer)

    def affordable() -> float:
        before = len(answers.read_bytes().splitlines()) if answers.exists() else 0  # of a run that was stopped here
        began = time.perf_counter()
        probed = first(before + PROBE_PROMPTS)  # the file is shuffled: a fair sample
        rate = (probed - before) / (time.perf_counter() - began)
        return max(probed, round(60 * minutes * GENERATE_SHARE * rate))

    return first(_once(answers.parent, "prompts", affordable))


def _evaluate(
    target: TransformersTarget, tokenizer: Any, recipe: Recipe, drafter: Path, folder: Path
) -> list[EvalResult]:
    """Results of this drafter under this recipe: those that are there, or new ones."""
    about, made_from = folder / "made_from.json", json.dumps(
        {"drafter": read_provenance(drafter).get("sha256"), "evaluate": recipe.evaluate.model_dump()}, indent=1
    )
    paths = [stages.result_path(folder, t) for t in recipe.evaluate.temperatures]
    if about.exists() and about.read_text("utf-8") == made_from and all(p.exists() for p in paths):
        return [EvalResult.load(p) for p in paths]
    held_out = stages.read_prompts([stages.TINY_HELD_OUT])
    results = stages.run_evaluate(target, tokenizer, recipe, open_drafter(drafter, target), held_out)
    stages.save_results(results, folder)
    about.write_text(made_from, encoding="utf-8")
    return results


def _same_recipe(run: Path, recipe: Recipe) -> bool:
    path = run / "recipe.yaml"
    return path.exists() and path.read_text("utf-8") == dump_recipe(recipe)

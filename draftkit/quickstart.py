"""The whole path in one command: every stage is skipped when its output is already there and valid."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from draftkit import stages
from draftkit.config import Recipe, dump_recipe
from draftkit.data.conversations import Conversation
from draftkit.evaluate.plots import plot_acceptance
from draftkit.evaluate.report import print_report

GENERATE_SHARE, TRAIN_SHARE = 0.20, 0.45  # of the minutes; the rest is for capture, evaluation and start-up
TOKENS_PER_SECOND = 1500  # of batched generation on two slow cores: decides how many prompts are answered
TOKENS_PER_ANSWER = 90
PROMPTS_PER_DOMAIN, SPEED_PROMPTS = 30, 24  # evaluated at each temperature


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
    recipe = _within(recipe, minutes)
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
        prompts = _share(stages.read_prompts([stages.TINY_PROMPTS]), minutes)
        notes.append(f"{stages.run_generate(target, tokenizer, recipe, prompts, answers)} answers of the target itself")
    with stage("capture") as notes:
        report = stages.run_capture(target, tokenizer, recipe, stages.read_prompts([answers]), features)
        notes.append(f"features of {report.tokens:,} tokens")
    with stage("train") as notes:
        if (run / "done.json").exists() and _same_recipe(run, recipe):
            notes.append(f"a drafter from this recipe is already there: {run / 'best'}")
        else:
            trained = stages.run_train(target, tokenizer, recipe, features, run)
            (run / "done.json").write_text(json.dumps(asdict(trained), indent=1), encoding="utf-8")
            notes.append(f"{trained.steps} steps, simulated accepted length {trained.best:.2f}")
    with stage("evaluate") as notes:
        drafter = stages.open_drafter(run / "best", target)
        held_out = stages.read_prompts([stages.TINY_HELD_OUT])
        results = stages.run_evaluate(target, tokenizer, recipe, drafter, held_out)
        stages.save_results(results, results_folder)
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
  draftkit evaluate -d {drafter} -o results          100 prompts per domain
  draftkit generate -p your_prompts.jsonl -o answers.jsonl
  draftkit capture -c answers.jsonl -o features
  draftkit train -f features -o drafter              longer, on your own conversations
"""


def _within(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with a training time and an evaluation that fit the minutes."""
    train = recipe.train.model_copy(update={"minutes": minutes * TRAIN_SHARE, "epochs": 1000})
    evaluate = recipe.evaluate.model_copy(
        update={"prompts_per_domain": PROMPTS_PER_DOMAIN, "speed_prompts": SPEED_PROMPTS}
    )
    return recipe.model_copy(update={"train": train, "evaluate": evaluate})


def _share(prompts: list[Conversation], minutes: float) -> list[Conversation]:
    """As many prompts as can be answered in the generation's share of the time; the file is shuffled."""
    return prompts[: round(60 * minutes * GENERATE_SHARE * TOKENS_PER_SECOND / TOKENS_PER_ANSWER)]


def _same_recipe(run: Path, recipe: Recipe) -> bool:
    path = run / "recipe.yaml"
    return path.exists() and path.read_text("utf-8") == dump_recipe(recipe)

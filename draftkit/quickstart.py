"""The whole path in one command: every stage is skipped when its output is already there and valid."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from draftkit import evaluate_stages, feature_stages, stages, train_stages
from draftkit.config import Recipe, dump_recipe
from draftkit.data.messages import Conversation
from draftkit.data.parts import SharedWork
from draftkit.draft.checkpoint import open_drafter
from draftkit.engine.answers import answerer
from draftkit.errors import ConfigError, DataError
from draftkit.evaluate.html_report import write_report
from draftkit.evaluate.plots import plot_acceptance
from draftkit.evaluate.report import print_report
from draftkit.evaluate.run import EvalResult
from draftkit.ops.sampling import Sampling
from draftkit.output import as_json, make_folder, write_text
from draftkit.schedule.simulate import Load, arms_for, simulate
from draftkit.schedule_stages import TRACES, open_simulation, run_record
from draftkit.suggest import program
from draftkit.target.transformers import TransformersTarget

GENERATE_SHARE, EVALUATE_SHARE = 0.14, 0.12  # of the minutes; training gets what capture leaves of the rest,
TRAIN_SHARE = 0.25  # but no less than this
PROBE_PROMPTS = 192  # answered first; their rate decides how many follow
# evaluated at each temperature: of a minute of the whole; timed, at least so many
PROMPTS_PER_DOMAIN, SPEED_PROMPTS = 4, 10
TRACED_PROMPTS = 4  # of every domain, for the simulation of a larger target


@dataclass(frozen=True)
class StageTime:
    """How long a stage took and what it says."""

    name: str
    seconds: float
    note: str


def run_quickstart(recipe: Recipe, out: Path, minutes: float, to_json: bool = False) -> None:
    """Run all stages into `out`, in about `minutes` minutes, and print the table and what to type next.

    Raises ConfigError when `out` was begun with other minutes, by which its stages were sized.
    """
    console = Console(stderr=to_json)
    make_folder(out)
    planned = _once(out, "minutes", lambda: minutes)
    if planned != minutes:
        raise ConfigError(
            f"--minutes {minutes:g}: {out} was planned for {planned:g}; give these, or choose another --out"
        )
    recipe = _evaluated_within(recipe, minutes)
    answers, features, run, results_folder = (
        out / "answers.jsonl",
        out / "features",
        out / "drafter",
        out / "results",
    )
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
        notes.append(
            f"{info.name}: {info.num_layers} layers, hidden size {info.hidden_size}, vocabulary "
            f"{info.vocab_size}"
        )
    with stage("generate") as notes:
        notes.append(f"{_generate(target, tokenizer, recipe, answers, minutes)} answers of the target itself")
    with stage("capture") as notes:
        read = stages.read_prompts([answers])
        report = feature_stages.run_capture(target, tokenizer, recipe, read, features)
        notes.append(f"features of {report.tokens:,} tokens")
    with stage("train") as notes:
        left = minutes * (1 - EVALUATE_SHARE) - sum(t.seconds for t in times) / 60
        recipe = _trained_within(
            recipe, _once(out, "train_minutes", lambda: max(minutes * TRAIN_SHARE, left))
        )
        if _was_trained(run, recipe):
            notes.append(f"a drafter from this recipe is already there: {run / 'best'}")
        else:
            source = feature_stages.open_features(recipe, target, tokenizer, [features])
            trained = train_stages.run_train(target, tokenizer, recipe, source, run, lambda: target)
            write_text(
                run / "done.json", as_json(asdict(trained) | {"recipe": dump_recipe(recipe)}, indent=1)
            )
            notes.append(f"{trained.steps} steps, simulated accepted length {trained.best:.2f}")
        seen = (
            int(_read_notes(run / "done.json").get("steps", 0))
            * recipe.train.batch_size
            / max(1, report.samples)
        )
    with stage("evaluate") as notes:
        held_out = stages.read_prompts([stages.TINY_HELD_OUT])
        results = evaluate_stages.run_evaluate(
            target, tokenizer, recipe, run / "best", held_out, results_folder
        )
        plot_acceptance(results, results_folder / "acceptance.png")
        larger = _simulated(target, tokenizer, recipe, run / "best", held_out, out / TRACES)
        notes.append(f"{len(results[0].records)} held-out prompts at {len(results)} temperatures")

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    measured = {"stages": [asdict(t) for t in times], "peak_gib": peak}
    write_text(out / "times.json", json.dumps(measured, indent=1))
    write_report(out, out / "report.html")
    if to_json:
        print(evaluate_stages.summary(results))
        return
    console.print()
    print_report(results)
    total = sum(t.seconds for t in times)
    console.print(f"{total / 60:.1f} minutes in all, peak memory {peak:.2f} GiB")
    console.print(
        f"acceptance by position: {results_folder / 'acceptance.png'}; all of it: {out / 'report.html'}"
    )
    parameters = sum(p.numel() for p in target.model.parameters())
    words = [
        _undertrained(seen),
        _why(results, parameters),
        LARGER.format(speed_up=larger, traces=out / TRACES),
    ]
    console.print("\n" + "\n".join(word for word in words if word), highlight=False)
    following = NEXT.format(drafter=run / "best", draftkit=program())
    console.print(following, highlight=False, soft_wrap=True)  # each command in one line


LARGER = """\
On a larger target, whose pass over eight tokens takes as long as over one, the same drafter would make \
answers {speed_up:.1f} x as fast for one user (simulated: draftkit simulate --traces {traces} \
--step-rate memory-bound).
To see drafting on a real model of 135 million parameters, in a clone of draftkit: make demo"""
NEXT = """
What to type next:
  {draftkit} serve --drafter {drafter}
    (an OpenAI-compatible server and a chat page on http://127.0.0.1:8000)
  {draftkit} chat --drafter {drafter}
    (the same in the terminal)
and for your own model and prompts (docs/your-model.md; one {{"prompt": "..."}} per line):
  {draftkit} generate -p prompts.jsonl -o answers.jsonl --target MODEL
  {draftkit} capture -c answers.jsonl -o features --target MODEL
  {draftkit} train -f features -o my_drafter --target MODEL
"""


def _undertrained(seen: float) -> str:
    """A warning for a drafter that has not seen every conversation once; `seen` counts how often it has, on
    average."""
    if seen >= 1:
        return ""
    few = f"it saw {100 * seen:.0f} % of the conversations once"
    return f"The drafter is undertrained: {few}. Give more --minutes and another --out."


def _why(results: Sequence[EvalResult], parameters: int) -> str:
    """Why drafting does not pay on a small target, where it does not at one of the temperatures."""
    if all(r.speed["all"].low > 1 for r in results):
        return ""
    return (
        f"Why drafting gains little or nothing on this target: its {parameters / 1e6:.0f} million weights "
        f"lie in the "
        "processor's cache, so each further token of a pass costs nearly as much as the first, and "
        "drafting takes time as well."
    )


def _simulated(
    target: TransformersTarget,
    tokenizer: Any,
    recipe: Recipe,
    drafter: Path,
    prompts: Sequence[Conversation],
    out: Path,
) -> float:
    """Speed-up of planned lengths for one user at temperature 0 on a machine that waits for memory, by traces
    of this pair. Traces of an earlier drafter are written over."""
    out.unlink(missing_ok=True)
    section = recipe.evaluate
    chosen = evaluate_stages.first_turns(stages.prompt_format(recipe, tokenizer), prompts, TRACED_PROMPTS)
    opened = open_drafter(drafter, target)
    run_record(target, opened, drafter, chosen, Sampling(0.0), section.max_new_tokens, section.seed, out)
    source, load = open_simulation(out, "memory-bound", None), Load(requests=100, concurrency=1)
    arms = arms_for(source.traces.gamma)
    plain, planned = (
        simulate(source.traces, source.table, load, n, arms[n]) for n in ("no speculation", "budget")
    )
    return planned.throughput / plain.throughput


def _trained_within(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with a training of so many minutes."""
    return recipe.model_copy(update={"train": replace(recipe.train, minutes=minutes, epochs=1000)})


def _evaluated_within(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with an evaluation that fits the minutes of the whole."""
    evaluate = replace(
        recipe.evaluate,
        prompts_per_domain=max(SPEED_PROMPTS, round(PROMPTS_PER_DOMAIN * minutes)),
        speed_prompts=SPEED_PROMPTS,
    )
    return recipe.model_copy(update={"evaluate": evaluate})


def _once(out: Path, name: str, decide: Callable[[], float]) -> float:
    """What was decided when this was first asked: kept, so that a second run goes on with the same."""
    path = out / "plan.json"
    plan = _read_notes(path)
    if name not in plan:
        plan[name] = decide()
        write_text(path, json.dumps(plan))
    if not isinstance(plan[name], int | float):
        raise DataError(
            f"{path}: {name} is {plan[name]!r}, must be a number; remove the file, or choose another --out"
        )
    return float(plan[name])


def _generate(
    target: TransformersTarget, tokenizer: Any, recipe: Recipe, answers: Path, minutes: float
) -> int:
    """Answer as many prompts as the generation's share of the time allows, measured once on the first of
    them."""
    # its code is built here, outside the measured rate
    answers_of = answerer(target, recipe.generate.batch_size)
    prompts = stages.read_prompts([stages.TINY_PROMPTS])

    def first(count: float) -> int:
        return stages.run_generate(
            target,
            tokenizer,
            recipe,
            lambda start: prompts[start : int(count)],
            answers,
            answers_of,
            int(count),
        ).records

    def affordable() -> float:
        before = SharedWork(answers).count()  # of a run that was stopped here
        began = time.perf_counter()
        probed = first(before + PROBE_PROMPTS)  # the file is shuffled: a fair sample
        rate = (probed - before) / (time.perf_counter() - began)
        return max(probed, round(60 * minutes * GENERATE_SHARE * rate))

    return first(_once(answers.parent, "prompts", affordable))


def _was_trained(run: Path, recipe: Recipe) -> bool:
    """Whether a training by this very recipe came to its end here."""
    return bool(_read_notes(run / "done.json").get("recipe") == dump_recipe(recipe))


def _read_notes(path: Path) -> dict[str, Any]:
    """What an earlier run wrote down; nothing where there is no such file. Raises DataError when it is
    damaged."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}); remove it, or choose another --out") from error

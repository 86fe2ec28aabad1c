"""A drafter for the user's own traffic: logs in, a drafter and a table of before and after out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from draftkit import evaluate_stages, feature_stages, stages, train_stages
from draftkit.config import Recipe, dump_recipe, load_recipe
from draftkit.data.conversations import SkippedRows, iterate_conversations, iterate_rows
from draftkit.data.traces import make_traces
from draftkit.draft.checkpoint_files import read_provenance
from draftkit.errors import ConfigError, DataError
from draftkit.evaluate.run import EvalResult
from draftkit.output import as_json, make_folder, write_text


@dataclass(frozen=True)
class Specialised:
    """Evaluations on held-out prompts, one per temperature; `before` is empty where there was no drafter to
    start from."""

    before: tuple[EvalResult, ...]
    after: tuple[EvalResult, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Accepted length with its 95 % interval and speed, by temperature and domain."""
        found = []
        for place, after in enumerate(self.after):
            before = self.before[place] if self.before else None
            for domain, length in after.accepted_len.items():
                timed = "all" if domain == "macro" else domain
                found.append(
                    {
                        "temperature": after.settings["sampling"]["temperature"],
                        "domain": domain,
                        "prompts": sum(domain in ("macro", r.domain) for r in after.records),
                        "before": asdict(before.accepted_len[domain]) if before else None,
                        "after": asdict(length),
                        "speed_before": before and _ratio(before, timed),
                        "speed_after": _ratio(after, timed),
                    }
                )
        return found


def recipe_for(name: str | None, overrides: Sequence[str], start_from: Path | None, out: Path) -> Recipe:
    """The recipe that was named, or else that of the drafter to start from. Raises ConfigError where neither
    is known."""
    if name is not None or start_from is None:
        return load_recipe(name or "tiny-dspark", overrides)
    written = read_provenance(start_from).get("recipe")
    if not isinstance(written, dict):
        raise ConfigError(f"{start_from}: does not say by which recipe it was trained; give --recipe")
    make_folder(out)
    path = out / "start.yaml"
    write_text(path, yaml.safe_dump(written, sort_keys=False))
    return load_recipe(str(path), overrides)


def run_specialise(
    recipe: Recipe,
    logs: Sequence[Path],
    out: Path,
    start_from: Path | None = None,
    regenerate: bool = False,
    form: str | None = None,
    keep_secrets: bool = False,
    say: Callable[[str], None] = print,
) -> Specialised:
    """Traces, answers of the target's own where they are asked for, features, a drafter, and both
    evaluations, all in `out`.

    An interrupted run goes on where it was. Held-out conversations are neither trained on nor validated with.
    Raises DataError when too little is held out to evaluate on.
    """
    make_folder(out)
    traces = out / "traces"
    report, skipped = make_traces(logs, traces, form, keep_secrets=keep_secrets)
    skipped.report()
    for line in report.lines():
        say(line)
    target, tokenizer = stages.open_target(recipe)
    learnt = [traces / "train.jsonl", *([traces / "validation.jsonl"] if report.kept["validation"] else [])]
    refused = SkippedRows()  # by the target's chat template: logs may be another model's
    if regenerate:
        answers, asked = out / "answers.jsonl", learnt
        stages.run_generate(
            target,
            tokenizer,
            recipe,
            lambda first: iterate_rows(asked, refused.anew(), first),
            answers,
            skipped=refused,
        )
        refused.report()
        learnt = [answers]
    read = stages.answers_of(recipe, tokenizer, learnt, refused)
    captured = feature_stages.run_capture(target, tokenizer, recipe, read, out / "features")
    refused.report()
    say(f"{captured.samples} samples, {captured.tokens} tokens ({captured.left_out()})")
    shown = stages.prompt_format(recipe, tokenizer)
    room = target.info.max_length - recipe.evaluate.max_new_tokens
    held_out = iterate_conversations([traces / "heldout.jsonl"]) if report.kept["heldout"] else iter(())
    prompts = evaluate_stages.every_turn(shown, held_out, recipe.evaluate.prompts_per_domain, room)
    if not prompts:
        raise DataError(f"{traces}: no answer of a held-out conversation can be evaluated; give more traces")
    features, run = out / "features", out / "drafter"
    source = feature_stages.open_features(recipe, target, tokenizer, [features])
    trained = train_stages.run_train(target, tokenizer, recipe, source, run, lambda: target, start_from)
    say(f"{trained.steps} steps in {trained.seconds:.0f} s")
    before = (
        evaluate_stages.evaluate_prompts(target, recipe, start_from, prompts, out / "before")
        if start_from
        else []
    )
    after = evaluate_stages.evaluate_prompts(target, recipe, out / "drafter" / "best", prompts, out / "after")
    found = Specialised(tuple(before), tuple(after))
    about = {"environment": after[0].environment, "traces": asdict(report), "steps": trained.steps}
    write_text(
        out / "specialised.json",
        as_json(about | {"rows": found.rows(), "recipe": dump_recipe(recipe)}, indent=1) + "\n",
    )
    return found


def print_specialised(found: Specialised, console: Console | None = None) -> None:
    """The table before and after, by temperature and domain."""
    title = "held-out conversations: accepted length (95 %), speed over plain decoding"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("T", "domain", "prompts", "before", "after", "speed before", "speed after"):
        table.add_column(
            column, justify="left" if column == "domain" else "right", no_wrap="speed" not in column
        )
    for row in found.rows():
        table.add_row(
            f"{row['temperature']:g}",
            row["domain"],
            str(row["prompts"]),
            *(_interval(row[side]) for side in ("before", "after")),
            *("-" if row[side] is None else f"{row[side]:.2f}" for side in ("speed_before", "speed_after")),
        )
    (console or Console()).print(table)


def _ratio(result: EvalResult, domain: str) -> float | None:
    return result.speed[domain].ratio if domain in result.speed else None


def _interval(given: dict[str, float] | None) -> str:
    return f"{given['value']:.2f} ({given['low']:.2f}\u2013{given['high']:.2f})" if given else "-"

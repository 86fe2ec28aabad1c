"""`report.html`: one run on one page, in one file without links to anything, for screens light and dark and
for paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from draftkit.errors import DraftkitError
from draftkit.evaluate.charts import interval_bars, lines
from draftkit.evaluate.metrics import PromptRecord
from draftkit.evaluate.report import speed_line, verdict
from draftkit.evaluate.run import EvalResult
from draftkit.evaluate.run_files import RunFiles, read_run
from draftkit.output import as_json, write_text
from draftkit.schedule.traces import Traces

TEMPLATE = Path(__file__).with_name("report.html.jinja")
ANSWERS, MOST_TOKENS, BINS = 10, 200, 10


@dataclass(frozen=True)
class Span:
    """Some tokens of an answer and who wrote them: "accepted", "target", or "rejected", whose text is how
    many drafted tokens were not kept there."""

    kind: str
    text: str


def write_report(run: Path, out: Path) -> RunFiles:
    """Make the page of a run's files. Raises DataError as `read_run`."""
    found = read_run(run)
    tokenizer = _tokenizer(found)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text("utf-8"))
    write_text(
        out,
        page.render(
            name=str(run),
            missing=found.missing,
            trained=_trained(found),
            results=[_result(one, tokenizer) for one in found.results],
            reliability=_reliability(found.traces),
            loads=_loads(found.bench),
            stages=found.stages,
            settings=as_json(
                {
                    f"T={r.settings['sampling']['temperature']:g}": r.settings | r.environment
                    for r in found.results
                },
                indent=1,
            ),
        ),
    )
    return found


def spans(record: PromptRecord, words: Sequence[str], gamma: int) -> list[Span]:
    """An answer's tokens as its rounds brought them; `words` are their texts. What the last round brought,
    if the limit cut it, is the target's to the eye: nobody knows how far it would have been accepted."""
    found = [Span("target", words[0])] if words else []
    place = 1
    for accepted in record.accepted_per_round:
        kept = min(accepted, len(words) - place)
        if kept > 0:
            found.append(Span("accepted", "".join(words[place : place + kept])))
        if accepted < gamma:
            found.append(Span("rejected", str(gamma - accepted)))
        place += kept
        if place < len(words):
            found.append(Span("target", words[place]))
            place += 1
        if place >= len(words):
            break
    if place < len(words):
        found.append(Span("target", "".join(words[place:])))
    return found


def reliability_of(traces: Traces) -> list[tuple[float, float]]:
    """Confidence and share of accepted tokens, by bins of confidence, over all positions reached."""
    reached = np.arange(traces.gamma) <= traces.accepted_N[:, None]
    reached &= np.arange(traces.gamma) < traces.usable_N[:, None]
    accepted = np.arange(traces.gamma) < traces.accepted_N[:, None]
    confidence, kept = traces.confidence_NG[reached], accepted[reached]
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        (float(confidence[place == b].mean()), float(kept[place == b].mean()))
        for b in range(BINS)
        if (place == b).any()
    ]


def _result(result: EvalResult, tokenizer: Any) -> dict[str, Any]:
    temperature = result.settings["sampling"]["temperature"]
    positions = {
        name: [(float(k), value) for k, value in enumerate(values, 1)]
        for name, values in result.acceptance.items()
    }
    return {
        "title": f"{result.settings['target']} at temperature {temperature:g}, {len(result.records)} answers",
        "lengths": interval_bars(result.accepted_len, "accepted length by domain"),
        "table": [(name, asdict(one)) for name, one in result.accepted_len.items()],
        "positions": lines(positions, "acceptance by position", "position in the block", "accepted"),
        "places": result.by_place,
        "speed": speed_line(result.speed) if result.speed else "",
        "verdict": verdict(result),
        "skipped": result.settings.get("skipped") or {},
        "answers": _answers(result, tokenizer),
    }


def _answers(result: EvalResult, tokenizer: Any) -> list[dict[str, Any]]:
    """Some answers, spread over all, in spans."""
    chosen = [r for r in result.records if r.answer_ids]
    found = []
    for record in chosen[:: max(1, len(chosen) // ANSWERS)][:ANSWERS]:
        ids = record.answer_ids[:MOST_TOKENS]
        words = _words(tokenizer, ids)
        length = record.emitted / record.rounds if record.rounds else 1.0
        found.append(
            {
                "id": record.prompt_id,
                "domain": record.domain,
                "length": f"{length:.2f}",
                "spans": spans(record, words, len(record.tried)),
                "cut": len(record.answer_ids) > len(ids),
            }
        )
    return found


def _words(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; characters of several tokens come with their last one."""
    if tokenizer is None:
        return [f"{i} " for i in ids]
    found, said = [], ""
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:count]))
        if text.endswith("\ufffd"):
            found.append("")
            continue
        found.append(text[len(said) :])
        said = text
    return found


def _tokenizer(found: RunFiles) -> Any:
    """The target's tokenizer, None where it cannot be loaded: answers are then shown as ids."""
    from draftkit.target.tokenizer import load_tokenizer

    names = [str(r.settings["target"]) for r in found.results]
    try:
        return load_tokenizer(names[0]) if names else None
    except (DraftkitError, OSError):
        return None


def _trained(found: RunFiles) -> list[tuple[str, str]]:
    """What was trained on what, from the drafter's provenance."""
    note = found.drafter
    if note is None:
        return []
    recipe = note.get("recipe") or {}
    drafter, train = recipe.get("drafter") or {}, recipe.get("train") or {}
    said = {
        "target": note.get("target"),
        "algorithm": note.get("algorithm"),
        "recipe": recipe.get("name"),
        "layers": drafter.get("num_layers"),
        "block": drafter.get("block_size"),
        "draft vocabulary": drafter.get("draft_vocab_size") or "whole",
        "template switches": json.dumps(note["template_switches"]) if "template_switches" in note else None,
        "steps": note.get("step"),
        "conversations per step": train.get("batch_size"),
        "learning rate": train.get("lr"),
        "validation": ", ".join(f"{k} {v:.2f}" for k, v in (note.get("validation") or {}).items()),
        "started from": note.get("started_from"),
    }
    return [(name, str(value)) for name, value in said.items() if value not in (None, "")]


def _reliability(traces: Traces | None) -> str | None:
    if traces is None or not traces.has_confidence:
        return None
    series = {"measured": reliability_of(traces), "exact": [(0.0, 0.0), (1.0, 1.0)]}
    return lines(series, "reliability of confidences", "confidence", "accepted")


def _loads(bench: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One row per server and level of a load test."""
    rows = []
    for run in (bench or {}).get("runs", []):
        for server in run["servers"]:
            rows.append({"users": run["concurrency"], **server})
    return rows

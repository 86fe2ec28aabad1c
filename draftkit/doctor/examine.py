"""The whole examination of a pair, family by family."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from draftkit.doctor.context import check_context
from draftkit.doctor.cost import drafted_tokens, measure_costs, sentences
from draftkit.doctor.deepseek_v4 import check_deepseek_v4
from draftkit.doctor.engine import check_engine
from draftkit.doctor.files import check_files, without_prefix
from draftkit.doctor.findings import Examination, Finding
from draftkit.doctor.machine import machine_facts
from draftkit.doctor.pair import Pair, open_pair
from draftkit.doctor.recorded import Recorded, record
from draftkit.doctor.server import check_server
from draftkit.doctor.text import check_text
from draftkit.doctor.trials import Ran, acceptance_of, run_trials
from draftkit.draft.checkpoint import shape_of
from draftkit.draft.drafter import Drafter, DrafterConfig
from draftkit.errors import CheckpointError, DraftkitError, ServeError, TargetError
from draftkit.evaluate.metrics import accepted_length
from draftkit.evaluate_stages import first_turns
from draftkit.handover.engines import engine_named
from draftkit.progress import progress_bar
from draftkit.stages import read_prompts
from draftkit.target.deepseek_v4_messages import asks
from draftkit.target.deepseek_v4_tensors import FAMILY
from draftkit.target.formats import format_of
from draftkit.target.loading import best_device, load_target
from draftkit.target.place import EMBEDDED
from draftkit.target.prompt_format import PromptFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from draftkit.target.weights import TargetFiles

FEWEST_SHARE = 0.8  # of what its own card says in its worst domain: less is a fault
LEAST_LENGTH = 1.05  # below which a drafter brings nothing anywhere


@dataclass(frozen=True)
class DoctorSettings:
    """What is run. `per_domain` prompts of every domain are answered with `max_new_tokens` tokens; contexts
    up to `context` tokens are tried, as far as the target allows; `switches` are the template's variables
    as the pair will be served."""

    prompts: Path = EMBEDDED / "heldout.jsonl"
    per_domain: int = 4
    max_new_tokens: int = 40
    context: int = 2048
    switches: dict[str, Any] = field(default_factory=dict)


def examine(
    target: str,
    drafter: Path,
    settings: DoctorSettings,
    engine: str | None = None,
    url: str | None = None,
    api_key: str | None = None,
) -> Examination:
    """Everything that can be said of a pair. Raises TargetError when the target is not there,
    CheckpointError when the drafter's folder is none, ConfigError for an unknown engine, ServeError for a
    server that does not answer; what is wrong with the drafter is a finding."""
    row = engine_named(engine) if engine else None
    files, tokenizer = TargetFiles(target), load_tokenizer(target)
    shown = format_of(tokenizer, settings.switches, date.today())
    deepseek = files.info.family == FAMILY
    try:
        pair = open_pair(drafter, files, tokenizer)
    except CheckpointError as error:
        what, _, mend = str(error).rpartition("; ")
        return Examination((Finding("files", what or mend, "it does not load", mend),))
    by_files = check_deepseek_v4(pair, settings.switches) if deepseek else check_files(pair)
    findings = [*by_files, *check_text(pair, settings.switches)]
    facts: list[str] = []
    numbers: dict[str, Any] = {}
    expected: float | None = None
    conversations = read_prompts([settings.prompts])
    prompts = first_turns(shown, conversations, settings.per_domain)
    asked = {c.id: c.measured().as_dicts() for c in conversations}
    loaded = _load(target, facts)
    if loaded is not None:
        with progress_bar("doctor", None) as bar:
            tick = lambda: bar.update(advance=1)  # noqa: E731
            # DeepSeek-V4's module reads the last layers; engines disagree on the last of all others
            layers = tuple(range(loaded.info.num_layers)) if deepseek else None
            recorded = record(loaded, prompts, settings.max_new_tokens, layers, tick)
            ran = run_trials(_on(pair, loaded), recorded, loaded.head_weight().dtype, tick)
            findings = _merged(findings, ran)
            if ran.first:
                expected = accepted_length(ran.first).value
            if ran.mended:
                mended = ran.mended_pair.drafter(loaded.head_weight().dtype)
                questions = [asked[one.prompt_id] for one in recorded]
                more, told, numbers = _what_it_brings(
                    loaded, mended, shown, questions, recorded, ran, settings, tick
                )
                findings += more + _against_card(pair, ran)
                facts += told + machine_facts(loaded, mended)
    try:
        shape = shape_of(pair.raw, str(drafter), files.info.num_layers)
    except CheckpointError:
        shape = None  # told by the load already
    if row is not None and shape is not None:
        more, told = check_engine(row, shape, drafter)
        findings, facts = findings + more, facts + told
    if url is not None:
        questions = [asked[p.prompt_id] for p in prompts]
        alone = [messages[0] for messages in questions if len(messages) == 1 and not asks(messages[0])]
        texts = [str(message["content"]) for message in alone]
        if not texts:
            raise ServeError(f"{settings.prompts}: has no prompt of one message to ask a server")
        block = (
            shape.gamma if isinstance(shape, DrafterConfig) else None
        )  # EAGLE-3 drafts as far as it is let
        more, told = check_server(url, api_key, texts, expected, block)
        findings, facts = findings + more, facts + told
    return Examination(tuple(findings), tuple(facts), numbers)


def _load(target: str, facts: list[str]) -> TransformersTarget | None:
    device = best_device()
    try:
        return load_target(target, dtype="float32" if device == "cpu" else "bfloat16", device=device)
    except TargetError as error:
        facts.append(f"the target does not run here, so nothing was tried by running: {error}")
        return None


def _on(pair: Pair, target: TransformersTarget) -> Pair:
    return without_prefix(Pair(pair.folder, pair.raw, pair.tensors, pair.note, target, pair.tokenizer))


def _merged(findings: Sequence[Finding], ran: Ran) -> list[Finding]:
    """Findings of the files, with the measured cost where running found the same; and why the drafter does
    not load, where no finding says it."""
    measured = {finding.check for finding in ran.findings}
    found = [*(finding for finding in findings if finding.check not in measured), *ran.findings]
    if not ran.first and not found:
        found.append(_why_not(ran.mended_pair))
    return found


def _why_not(pair: Pair) -> Finding:
    try:
        pair.drafter(torch.float32)
    except DraftkitError as error:
        what, _, mend = str(error).rpartition("; ")
        return Finding("drafter", what or mend, "it does not load", mend if what else "copy the folder again")
    return Finding("drafter", "proposes nothing", "all of it", "train it again")


def _what_it_brings(
    target: TransformersTarget,
    drafter: Drafter,
    shown: PromptFormat,
    questions: Sequence[Sequence[dict[str, Any]]],
    recorded: Sequence[Recorded],
    ran: Ran,
    settings: DoctorSettings,
    tick: Any,
) -> tuple[list[Finding], list[str], dict[str, Any]]:
    """Length, depth of context, and break-even of the mended pair."""
    length, acceptance = accepted_length(ran.mended), acceptance_of(ran.mended)
    now = f" ({accepted_length(ran.first).value:.2f} as it is)" if ran.findings and ran.first else ""
    places = " ".join(f"{100 * a:.0f}" for a in acceptance)
    facts = [
        f"accepted length {length.value:.2f} (95 % {length.low:.2f} to {length.high:.2f}){now} on "
        f"{len(recorded)} "
        f"prompts at temperature 0; acceptance by position {places} %"
    ]
    found: list[Finding] = []
    if length.high < LEAST_LENGTH:
        found.append(
            Finding(
                "proposals",
                f"hardly a drafted token is accepted (accepted length {length.value:.2f})",
                "everything that drafting could bring",
                "no change that was tried mends it: give the target and template of its training, or "
                "train it",
            )
        )
    longest = min(settings.context, target.info.max_length)
    deep, by_length = check_context(
        target, drafter, shown, questions, recorded, ran.mended, longest, settings.max_new_tokens, tick
    )
    facts.append(
        "accepted length by tokens of context: "
        + ", ".join(
            f"{tokens:,}: {one.value:.2f} ({one.low:.2f} to {one.high:.2f})"
            for tokens, one in by_length.items()
        )
    )
    costs = drafted_tokens(measure_costs(target, drafter), acceptance, drafter.config.algorithm == "eagle3")
    facts += sentences(costs)
    numbers = {
        "accepted_len": asdict(length),
        "acceptance": acceptance,
        "by_context": {str(tokens): asdict(one) for tokens, one in by_length.items()},
        "drafted_tokens": [asdict(one) for one in costs],
    }
    return found + deep, facts, numbers


def _against_card(pair: Pair, ran: Ran) -> list[Finding]:
    """The measured length against the drafter's own note of its validation."""
    said = pair.note.get("validation") or {}
    lengths = [v for name, v in said.items() if name not in ("loss", "macro") and isinstance(v, int | float)]
    if not lengths or not ran.first or ran.findings:
        return []  # nothing is said, or the faults that were found explain it
    length, least = accepted_length(ran.first), min(lengths)
    if length.high >= FEWEST_SHARE * least or length.high < LEAST_LENGTH:  # the latter is told by itself
        return []
    return [
        Finding(
            "card",
            f"the accepted length is {length.value:.2f} (at most {length.high:.2f}), its own note says "
            f"{least:.2f} in "
            "its worst domain",
            f"{100 * (1 - length.value / least):.0f} % of what it brought in training",
            "compare target, template and kind of text with those of the training",
        )
    ]


def print_examination(found: Examination) -> None:
    """Findings, then facts, one line each."""
    for finding in found.findings:
        print(finding.line())
    for fact in found.facts:
        print(f"  {fact}")
    count = len(found.findings)
    print("no findings" if not count else f"{count} finding{'s' if count > 1 else ''}", file=sys.stderr)

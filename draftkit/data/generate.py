"""The target answers prompts into a file of records: a steady stream, which can be stopped and shared at any
moment.

As soon as an answer is finished the next question goes in, and a finished conversation is written at once.
What an answer says depends on the prompt's id and text, the seed and the settings: not on its neighbours, on
the order of the prompts, or on which process makes it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftkit.data.answers import Answers
from draftkit.data.conversations import SkippedRows
from draftkit.data.dialogue import TOO_LONG, Dialogue
from draftkit.data.messages import Conversation
from draftkit.data.parts import Part, SharedWork
from draftkit.data.records import check_manifest
from draftkit.data.refused import asked_ones
from draftkit.data.samples import unshown_line
from draftkit.settings import GenerateSettings
from draftkit.target.prompt_format import PromptFormat

WAIT_SECONDS = 1.0  # between looks at parts that other processes work on


@dataclass
class GenerateReport:
    """What a file of records holds, by finish reason, and what this run made of it; `unshown` are parts of
    its prompts that the template does not show, by name."""

    reasons: dict[str, int] = field(default_factory=dict)
    answered_here: int = 0
    tokens_here: int = 0
    unshown: Counter[str] = field(default_factory=Counter)

    @property
    def records(self) -> int:
        """Records in all."""
        return sum(self.reasons.values())


def generate_file(
    answers: Answers,
    prompt_format: PromptFormat,
    prompts: Callable[[int], Iterable[Conversation | None]],
    out: Path,
    settings: GenerateSettings,
    made_with: dict[str, Any],
    tick: Callable[[int, int], None] = lambda conversations, tokens: None,
    skipped: SkippedRows | None = None,
) -> GenerateReport:
    """Answer all prompts into `out`, together with other processes that do the same.

    `prompts(n)` gives those after the first n rows, anew each time it is called, None for a row that is left
    out; they are not held in memory. A run that goes on begins where the last one was, and looks at all of
    them before it ends. `made_with` goes into the manifest. What the chat template refuses goes into
    `skipped`, where it is given. The reason "length" marks an answer that a limit cut, or a conversation that
    filled the context before its last turn, "too_long" a prompt that leaves no room for an answer; a line
    on standard error counts these. `tick(conversations, tokens)` is called for tokens as they are written,
    and for conversations as they finish. Raises DataError when `out` was begun with something else, holds
    answers to other prompts of the same ids, and when the chat template refuses a prompt that may not be
    skipped.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = SharedWork(out)
    check_manifest(out, made_with, prompt_format.today, work.begun)
    report = GenerateReport()
    answers.on_tokens = lambda count: tick(0, count)
    all_parts = False
    while True:
        claims = work.claims(prompts, all_parts)
        for record in _answer(answers, prompt_format, claims, settings, skipped, report.unshown):
            report.answered_here += 1
            report.tokens_here += record["completion_tokens"]
            tick(1, 0)
        if all_parts and not work.busy and work.join():
            break
        if all_parts or work.busy:
            time.sleep(WAIT_SECONDS)
        all_parts = not work.busy
    for done in work.reasons.values():
        report.reasons[done.reason] = report.reasons.get(done.reason, 0) + 1
    if line := unshown_line(report.unshown):
        print(line, file=sys.stderr)
    if count := report.reasons.get(TOO_LONG):
        longest = next(name for name, done in work.reasons.items() if done.reason == TOO_LONG)
        line = f"{count} of {report.records} prompts leave no room for an answer, {longest!r} first"
        print(f"{out}: {line}; their records say finish_reason {TOO_LONG!r}", file=sys.stderr)
    return report


def _answer(
    answers: Answers,
    prompt_format: PromptFormat,
    parts: Iterator[Part],
    settings: GenerateSettings,
    skipped: SkippedRows | None,
    unshown: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Records as they are finished and written. As many conversations are open as `answers` has room for."""
    running: dict[str, tuple[Dialogue, Part]] = {}
    held: list[Part] = []
    waiting = ((p, part) for part in _kept(parts, held) for p in part.todo)

    def close(part: Part) -> None:
        part.close()
        held.remove(part)

    try:
        while True:
            while answers.room and (item := next(waiting, None)):
                prompt, part = item
                if skipped is not None and not any(asked_ones([prompt], prompt_format, skipped)):
                    if part.leave_out(prompt.id):
                        close(part)
                    continue
                dialogue = Dialogue(prompt, prompt_format, settings.seed)
                asked = prompt.prompt().as_dicts()
                spoken = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in asked]
                unshown.update(prompt_format.unshown(spoken, prompt.tools))
                if dialogue.question is not None:
                    running[dialogue.id] = dialogue, part
                    answers.ask(dialogue.question, settings)
            if not running:
                return
            for key, answer in answers.finished():
                dialogue, part = running[key]
                dialogue.answered(answer)
                if dialogue.question is not None:
                    answers.ask(dialogue.question, settings)
                    continue
                del running[key]
                record = dialogue.record()
                if part.add(record):
                    close(part)
                yield record
    finally:
        for part in held:
            part.close()


def _kept(parts: Iterator[Part], held: list[Part]) -> Iterator[Part]:
    for part in parts:
        held.append(part)
        yield part

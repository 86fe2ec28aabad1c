"""The answers to a suite, by one process or several that share the prompts.

Every prompt has a place in its set and from it a seed, so an answer does not depend on who gives it. Where
a row has several turns, each is asked after the answer to the one before. Prompts that leave no room for
the answer are skipped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from draftkit.decode import Decoded
from draftkit.draft.drafter import Drafter
from draftkit.engine.answers import decode_all, sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.paged_model import unsupported
from draftkit.engine.settings import EngineSettings
from draftkit.errors import TargetError
from draftkit.evaluate.metrics import PromptRecord, record_of
from draftkit.evaluate.suites import AskedRow
from draftkit.ops.sampling import Sampling
from draftkit.settings import EvaluateSettings
from draftkit.target.prompt_format import PromptFormat
from draftkit.target.transformers import TransformersTarget


@dataclass(frozen=True)
class SuiteRecord:
    """What one prompt contributes, and its place: set, row among those drawn, turn from 0. `record` is None
    for one that was skipped."""

    suite: str
    place: int
    turn: int
    record: PromptRecord | None


@dataclass
class _Chat:
    row: AskedRow
    suite: str
    messages: list[dict[str, Any]]


def answer_suite(
    target: TransformersTarget,
    drafter: Drafter,
    shown: PromptFormat,
    sets: Mapping[str, Sequence[AskedRow]],
    settings: EvaluateSettings,
    sampling: Sampling,
    rank: int = 0,
    size: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> list[SuiteRecord]:
    """The records of this process's rows: every `size`-th of each set, from `rank` on. Raises TargetError
    for a family that the engine does not run."""
    if reason := unsupported(target):
        raise TargetError(
            f"{target.info.name}: --suite answers through the engine, which does not run it: {reason}"
        )
    engine = Engine(
        target, drafter, EngineSettings(plan="fixed", max_running=settings.batch_size, prefix_reuse=False)
    )
    chats = [_Chat(row, name, []) for name, rows in sets.items() for row in rows[rank::size]]
    found: list[SuiteRecord] = []
    for turn in range(max((len(c.row.turns) for c in chats), default=0)):
        chats = [c for c in chats if len(c.row.turns) > turn]
        prompts = []
        for chat in chats:
            chat.messages.append({"role": "user", "content": chat.row.turns[turn]})
            prompts.append(shown.prompt(chat.messages))
        room = target.info.max_length - settings.max_new_tokens - drafter.gamma
        fits = [len(prompt) <= room for prompt in prompts]
        asked = [(chat, prompt) for chat, prompt, fit in zip(chats, prompts, fits, strict=True) if fit]
        skipped = [chat for chat, fit in zip(chats, fits, strict=True) if not fit]
        found += [SuiteRecord(chat.suite, chat.row.place, turn, None) for chat in skipped]
        requests = [
            (prompt, sampling_params(sampling, settings.max_new_tokens, settings.seed + chat.row.place))
            for chat, prompt in asked
        ]
        for (chat, prompt), decoded in zip(asked, decode_all(engine, requests, tick), strict=True):
            found.append(_record(shown, drafter, chat, turn, len(prompt), decoded))
            said = shown.parse(decoded.tokens, prompt).message()
            chat.messages.append({"role": "assistant", "content": said.get("content") or ""})
        chats = [chat for chat, _ in asked]
    return found


def in_order(records: Sequence[SuiteRecord], sets: Sequence[str]) -> list[SuiteRecord]:
    """By set, place and turn: the same whoever answered."""
    return sorted(records, key=lambda r: (list(sets).index(r.suite), r.place, r.turn))


def skipped_by_set(records: Sequence[SuiteRecord]) -> dict[str, int]:
    """How many prompts of each set left no room for an answer."""
    counts: dict[str, int] = {}
    for one in records:
        counts[one.suite] = counts.get(one.suite, 0) + (one.record is None)
    return {name: count for name, count in counts.items() if count}


def _record(
    shown: PromptFormat, drafter: Drafter, chat: _Chat, turn: int, prompt_tokens: int, decoded: Decoded
) -> SuiteRecord:
    name = f"{chat.suite}-{chat.row.line}" + (f"#{turn + 1}" if len(chat.row.turns) > 1 else "")
    record = replace(
        record_of(decoded, name, chat.suite, drafter.gamma),
        prompt_tokens=prompt_tokens,
        text=shown.tokenizer.decode(decoded.tokens, skip_special_tokens=True),
    )
    return SuiteRecord(chat.suite, chat.row.place, turn, record)

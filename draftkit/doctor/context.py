"""Acceptance by length of context: what a drafter still brings after a long conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from draftkit.doctor.findings import Finding
from draftkit.doctor.recorded import Recorded, record, records_along
from draftkit.draft.drafter import Drafter
from draftkit.evaluate.metrics import Interval, PromptRecord, accepted_length
from draftkit.evaluate.run import EvalPrompt
from draftkit.target.prompt_format import PromptFormat
from draftkit.target.transformers import TransformersTarget

SHARES = (0.25, 0.5, 1.0)  # of the longest context
QUESTIONS = 4  # asked at each length
FALLEN = 0.6  # of the accepted length that a quarter of the context has: less is a fault


def long_prompts(
    shown: PromptFormat,
    questions: Sequence[Sequence[dict[str, Any]]],
    recorded: Sequence[Recorded],
    length: int,
) -> list[EvalPrompt]:
    """Questions at the end of a conversation of recorded answers, nearly `length` tokens in all."""
    said = [shown.tokenizer.decode(r.tokens[r.prompt_tokens :], skip_special_tokens=True) for r in recorded]
    found: list[EvalPrompt] = []
    for number, question in enumerate(questions[:QUESTIONS]):
        history: list[dict[str, Any]] = []
        best = shown.prompt(question)
        for turn in range(10_000):
            place = (number + turn) % len(recorded)
            history += [*questions[place], {"role": "assistant", "content": said[place]}]
            tokens = shown.prompt([*history, *question])
            if len(tokens) > length or len(tokens) <= len(best):
                break
            best = tokens
        found.append(EvalPrompt(f"deep-{number}", "deep", best))
    return found


def check_context(
    target: TransformersTarget,
    drafter: Drafter,
    shown: PromptFormat,
    questions: Sequence[Sequence[dict[str, Any]]],
    recorded: Sequence[Recorded],
    short: Sequence[PromptRecord],
    longest: int,
    max_new_tokens: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[Finding], dict[int, Interval]]:
    """What the longest context costs, and the accepted length by tokens of context. `short` are the rounds of
    the questions alone."""
    room = longest - max_new_tokens - drafter.gamma - 1
    by_length = {_mean_length(recorded): accepted_length(short)}
    for share in SHARES:
        prompts = long_prompts(shown, questions, recorded, int(share * room))
        if not prompts or len(prompts[0].tokens) <= 2 * _mean_length(recorded):
            continue  # no longer than the questions
        deep = record(target, prompts, max_new_tokens, drafter.config.feature_layers)
        by_length[_mean_length(deep)] = accepted_length(records_along(drafter, deep))
        tick()
    return fallen(by_length), by_length


def fallen(by_length: dict[int, Interval]) -> list[Finding]:
    """The fault that accepted lengths by tokens of context show. The first are the questions alone; long
    conversations are compared with shorter ones, since a history changes what is asked, too."""
    lengths = list(by_length)
    if len(lengths) < 3:
        return []
    near, far = by_length[lengths[1]], by_length[lengths[-1]]
    if not (far.high < near.low and far.value < FALLEN * near.value):
        return []
    what = f"after {lengths[-1]:,} tokens of context the accepted length is {far.value:.2f}"
    return [
        Finding(
            "long context",
            f"{what}, after {lengths[1]:,} it is {near.value:.2f}",
            f"{100 * (1 - far.value / near.value):.0f} % of the accepted length there",
            "train on longer conversations (capture.max_length), or give it a window (drafter.window)",
        )
    ]


def _mean_length(recorded: Sequence[Recorded]) -> int:
    return round(sum(len(r.tokens) for r in recorded) / len(recorded))

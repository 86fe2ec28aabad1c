"""From conversations and records to what training learns from: token ids, and which of them the target wrote.

A record brings its ids; nothing is tokenised again. The answers of a text are found by the prompt format. An
answer whose prompt goes on from the one before, id by id, shares its sample; where history is rewritten
(thoughts that a template drops, text that is tokenised in another way) each answer keeps the context in which
it is served, and becomes a sample of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from draftkit.data.messages import Conversation, WrittenTurn
from draftkit.errors import DataError
from draftkit.target.prompt_format import PromptFormat, RewrittenError, TemplateError, is_answer

CutAnswers = Literal["keep", "drop"]


@dataclass(frozen=True)
class Sample:
    """Token ids, and per token whether the target wrote it; `conversation` is the id of what it is part
    of."""

    id: str
    conversation: str
    domain: str
    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass
class SampleCounts:
    """What became of the conversations that were read; `unshown` are parts that the template does not show,
    by name."""

    conversations: int = 0
    samples: int = 0
    written: int = 0  # tokens
    cut: int = 0  # answers that a limit ended
    cut_dropped: int = 0
    rewritten: int = 0
    without_answer: int = 0
    unshown: Counter[str] = field(default_factory=Counter)


def unshown_line(unshown: Counter[str]) -> str:
    """What the template does not show, in words; empty where it shows all."""
    parts = ", ".join(f"{name} (in {count})" for name, count in sorted(unshown.items()))
    return f"not shown by the chat template: {parts}" if parts else ""


@contextmanager
def naming_conversation(name: str) -> Iterator[None]:
    """Errors of the prompt format with the conversation's name."""
    try:
        yield
    except TemplateError as error:
        raise DataError(f"conversation {name}: {error}, or leave such ones out by --skip-invalid") from error


def samples_of(
    conversations: Iterable[Conversation],
    prompt_format: PromptFormat,
    vocab_size: int,
    counts: SampleCounts,
    cut_answers: CutAnswers = "keep",
) -> Iterator[Sample]:
    """Samples in order. Conversations whose answers cannot be found in what the template writes are counted
    and left out.

    Raises DataError that names the conversation for token ids beyond the vocabulary, records made with other
    template switches, and where the template refuses it.
    """
    for conversation in conversations:
        counts.conversations += 1
        _check_switches(conversation, prompt_format.switches)
        try:
            turns = conversation.turns or _turns_of_text(conversation, prompt_format, counts)
        except RewrittenError:
            counts.rewritten += 1
            continue
        counts.cut += sum(turn.cut for turn in turns)
        if cut_answers == "drop":
            counts.cut_dropped += sum(turn.cut for turn in turns)
            turns = tuple(turn for turn in turns if not turn.cut)
        _check_ids(conversation.id, turns, vocab_size)
        joined = list(_joined(turns))
        counts.without_answer += not joined
        for number, (tokens, mask) in enumerate(joined):
            counts.samples += 1
            counts.written += sum(mask)
            name = conversation.id if len(joined) == 1 else f"{conversation.id}#{number}"
            yield Sample(name, conversation.id, conversation.domain, tuple(tokens), tuple(mask))


def _turns_of_text(
    conversation: Conversation, prompt_format: PromptFormat, counts: SampleCounts
) -> tuple[WrittenTurn, ...]:
    messages, tools = conversation.as_dicts(), conversation.tools
    last = conversation.messages[-1].content or ""
    cut = conversation.cut and is_answer(messages, len(messages) - 1)
    if cut and "<think>" in last and "</think>" not in last:
        raise RewrittenError("it was cut in its thinking, which a template cannot write")
    with naming_conversation(conversation.id):
        turns = prompt_format.turns(messages, tools, cut)
    counts.unshown.update(prompt_format.unshown(messages, tools))
    reasons = ["stop"] * len(turns)
    if cut and turns:
        reasons[-1] = "length"
    return tuple(WrittenTurn(t.prompt_ids, t.answer_ids, why) for t, why in zip(turns, reasons, strict=True))


def _joined(turns: Iterable[WrittenTurn]) -> Iterator[tuple[list[int], list[bool]]]:
    """(tokens, mask) of answers, joined with the one before where its prompt and answer begin the next
    prompt."""
    tokens: list[int] = []
    mask: list[bool] = []
    for turn in turns:
        if not turn.answer_ids:
            continue
        prompt = list(turn.prompt_ids)
        if tokens and prompt[: len(tokens)] != tokens:
            yield tokens, mask
            tokens, mask = [], []
        mask += [False] * (len(prompt) - len(tokens)) + [True] * len(turn.answer_ids)
        tokens = prompt + list(turn.answer_ids)
    if tokens:
        yield tokens, mask


def _check_ids(name: str, turns: Iterable[WrittenTurn], vocab_size: int) -> None:
    for turn in turns:
        wrong = max((*turn.prompt_ids, *turn.answer_ids), default=0)
        if wrong >= vocab_size:
            raise DataError(
                f"conversation {name}: token id {wrong} is beyond the target's vocabulary of {vocab_size}; "
                "the record is another model's"
            )


def _check_switches(conversation: Conversation, switches: Mapping[str, Any]) -> None:
    made_with = conversation.switches
    if made_with is not None and dict(made_with) != dict(switches):
        raise DataError(
            f"conversation {conversation.id}: was made with template switches {made_with}, this run has "
            f"{dict(switches)}; "
            "give the same in target.template_switches"
        )

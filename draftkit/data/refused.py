"""Conversations that a chat template refuses (roles that do not alternate, a system message, parts that it
cannot show): left out and named, where a run may leave out what is invalid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from draftkit.data.conversations import SkippedRows
from draftkit.data.messages import Conversation
from draftkit.target.prompt_format import PromptFormat, RewrittenError, TemplateError


def asked_ones(
    conversations: Iterable[Conversation], shown: PromptFormat, skipped: SkippedRows
) -> Iterator[Conversation]:
    """Those that can be asked; each is rendered once more for that."""
    for conversation in conversations:
        try:
            shown.prompt(_with_answers(conversation.prompt()), conversation.tools)
        except TemplateError as error:
            skipped.add(f"conversation {conversation.id}: {error}")
        else:
            yield conversation


def learnt_ones(
    conversations: Iterable[Conversation], shown: PromptFormat, skipped: SkippedRows
) -> Iterator[Conversation]:
    """Those whose answers can be shown; each is rendered once more for that, but for records, which bring
    their token ids."""
    for conversation in conversations:
        try:
            with suppress(RewrittenError):  # capture counts these
                _ = conversation.turns or shown.turns(conversation.as_dicts(), conversation.tools)
        except TemplateError as error:
            skipped.add(f"conversation {conversation.id}: {error}")
        else:
            yield conversation


def _with_answers(asked: Conversation) -> list[dict[str, Any]]:
    """The messages of a prompt; where answers will stand between them, one letter stands for each."""
    messages = asked.as_dicts()
    if asked.keeps_history:
        return messages
    found: list[dict[str, Any]] = []
    for message in messages:
        answer = {"role": "assistant", "content": "a"} if found and found[-1]["role"] == "user" else None
        found += [answer, message] if answer else [message]
    return found

"""Chat template and loss mask in one pass over the text: rendered once, tokenised once, never by prefixes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftkit.data.conversations import Conversation
from draftkit.errors import DataError

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters: no conversation holds them
_TAG = re.compile(r"(</?think>)")
_BEGUN = re.compile(r"<think>\s*(?:</think>\s*)?\Z")  # a thinking part that begins right before what follows
_ENDS = ("", "\n", None)  # what templates strip from either end of a text: nothing, line ends, white space


class RewrittenError(DataError):
    """The chat template writes something else than the conversation's contents, so nobody can say who wrote what."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation and, per token, whether the assistant wrote it (its end-of-turn token included)."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True)
class _Part:
    """A piece of a content that a mark stands for, and the number of its message."""

    message: int
    text: str


def render_prompt(tokenizer: Any, messages: list[dict[str, str]], name: str = "without an id") -> tuple[int, ...]:
    """Token ids of a prompt, up to where the assistant begins to write.

    Raises DataError, with the conversation's name, when the template refuses it.
    """
    text = _apply(tokenizer, messages, name, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_conversation(tokenizer: Any, conversation: Conversation) -> Rendered:
    """Tokens and loss mask of a whole conversation.

    The template is run a second time with marks in place of the contents, which shows where each content lies in the
    text; the text is tokenised once, with character offsets. What the template leaves out, as the thinking of earlier
    turns, is in neither. Raises DataError when the template refuses the conversation, RewrittenError when it rewrites it.
    """
    messages = conversation.as_dicts()
    text = _apply(tokenizer, messages, conversation.id)
    marked, parts = _marked(messages)
    spans = _spans(text, _apply(tokenizer, marked, conversation.id), messages, parts, conversation.id)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    special = _special_ids(tokenizer)
    mask = [False] * len(tokens)
    index = 0
    for start, end in spans:
        while index < len(tokens) and offsets[index][1] <= start:
            index += 1
        while index < len(tokens) and offsets[index][0] < end:
            mask[index] = True
            index += 1
        if index < len(tokens) and tokens[index] in special:  # the end of the turn is the assistant's to write
            mask[index] = True
    return Rendered(tuple(tokens), tuple(mask))


def _apply(tokenizer: Any, messages: list[dict[str, str]], name: str, **options: bool) -> str:
    """The text of a conversation. Raises DataError when the template does: it is a program, and may raise anything."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"conversation {name}: the chat template refuses it ({reason}); change or remove it") from error


def _special_ids(tokenizer: Any) -> set[int]:
    """Special tokens, also those without a name of their own (Gemma 3's <end_of_turn>, Phi-3's <|end|>)."""
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {number for number, token in added if token.special}


def _marked(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[_Part]]:
    """The messages with numbered marks in place of what they say, and what each mark stands for.

    Thinking tags and blank parts stay: a template looks for them, and must go the same way as with the contents.
    """
    marked: list[dict[str, str]] = []
    parts: list[_Part] = []
    for number, message in enumerate(messages):
        pieces = _TAG.split(message["content"])
        for i, piece in enumerate(pieces):
            if piece.strip() and not _TAG.fullmatch(piece):
                pieces[i] = f"{_OPEN}{len(parts)}{_CLOSE}"
                parts.append(_Part(number, piece))
        marked.append({**message, "content": "".join(pieces)})
    return marked, parts


def _spans(
    text: str, skeleton: str, messages: list[dict[str, str]], parts: Sequence[_Part], name: str
) -> list[tuple[int, int]]:
    """Character spans of the assistant's contents in `text`, one per message, in order."""
    before, *pieces = skeleton.split(_OPEN)
    position = len(before)
    if not text.startswith(before):
        raise RewrittenError(f"conversation {name}: the chat template depends on contents in a way that hides their place")
    spans: dict[int, tuple[int, int]] = {}
    for piece in pieces:
        mark, after = piece.split(_CLOSE, 1)
        part = parts[int(mark)]
        found = next((c for c in _stripped(part.text) if text.startswith(c + after, position)), None)
        if found is None:
            raise RewrittenError(f"conversation {name}: the chat template rewrites the content of message {part.message}")
        message = messages[part.message]
        if message["role"] == "assistant":
            begun = _BEGUN.search(before) if "<think>" in message["content"] else None  # else the template's own
            start, _ = spans.get(part.message, (position - len(begun[0]) if begun else position, 0))
            spans[part.message] = start, position + len(found)
        position += len(found) + len(after)
        before = after
    return list(spans.values())


def _stripped(text: str) -> list[str]:
    """A text in the forms in which templates write it."""
    return [text.lstrip(left).rstrip(right) for left in _ENDS for right in _ENDS]

"""Chat template and loss mask in one pass over the text: rendered once, tokenised once, never by prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftkit.data.conversations import Conversation
from draftkit.errors import DataError

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters: no conversation holds them


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation and, per token, whether the assistant wrote it (its end-of-turn token included)."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]


def render_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """Token ids of a prompt, up to where the assistant begins to write."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_conversation(tokenizer: Any, conversation: Conversation) -> Rendered:
    """Tokens and loss mask of a whole conversation.

    The template is run a second time with marks in place of the contents, which shows where each content lies in the
    text; the text is tokenised once, with character offsets. Raises DataError when the template rewrites contents.
    """
    messages = conversation.as_dicts()
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    marked = [{**m, "content": f"{_OPEN}{i}{_CLOSE}"} for i, m in enumerate(messages)]
    skeleton = tokenizer.apply_chat_template(marked, tokenize=False)
    spans = _spans(text, skeleton, messages, conversation.id)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    special = set(tokenizer.all_special_ids)
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


def _spans(text: str, skeleton: str, messages: list[dict[str, str]], name: str) -> list[tuple[int, int]]:
    """Character spans of the assistant's contents in `text`, in order."""
    pieces = skeleton.split(_OPEN)
    position = len(pieces[0])
    if not text.startswith(pieces[0]):
        raise DataError(f"conversation {name}: the chat template depends on contents in a way that hides their place")
    spans = []
    for piece in pieces[1:]:
        number, after = piece.split(_CLOSE, 1)
        message = messages[int(number)]
        content = next(
            (c for c in (message["content"], message["content"].strip()) if text.startswith(c + after, position)), None
        )
        if content is None:
            raise DataError(f"conversation {name}: the chat template rewrites the content of message {number}")
        if message["role"] == "assistant":
            spans.append((position, position + len(content)))
        position += len(content) + len(after)
    return spans

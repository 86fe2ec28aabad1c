"""What a client wrote is text: a special token's name in it is spelled with ordinary tokens, so that nobody
ends a turn, or begins another role's, from inside a message.

Names are marked before the chat template runs, and the marks are found again in what it has written: the
template's own special tokens are honoured, those of contents, tools and documents are not. Tokens that the
tokenizer adds without calling them special (`<think>` and `<tool_call>` in many) stay what they are:
templates look for them in contents.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any

from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.problem import bad_request, printable, shorten

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})  # of OpenAI's API


class PlainText:
    """Marks special tokens' names in values, and encodes rendered text with marks. One for each request."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        backend = texts.tokenizer.backend_tokenizer
        self._names = [name for token in sorted(texts.special) if (name := backend.id_to_token(token))]
        self._pattern = re.compile(
            "|".join(re.escape(name) for name in sorted(self._names, key=len, reverse=True)) or "(?!)"
        )
        self._mark = f"\ue000{secrets.token_hex(8)}:"  # private use, and nobody can know it beforehand
        self._marked: set[str] = set()

    def mark(self, value: Any) -> Any:
        """The value with marks where a special token's name was, in texts at any depth, names of fields
        included."""
        if isinstance(value, str):
            return self._pattern.sub(self._replaced, value)
        if isinstance(value, dict):
            return {self.mark(name): self.mark(one) for name, one in value.items()}
        return [self.mark(one) for one in value] if isinstance(value, list) else value

    def encode(self, rendered: str, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of what the template has written."""
        if not self._marked:
            return self._texts.encode(rendered, add_special_tokens)
        ids = list(self._texts.encode("", add_special_tokens))
        for place, piece in enumerate(re.split(re.escape(self._mark) + r"(\d+);", rendered)):
            if place % 2:
                ids += self._texts.spell(self._names[int(piece)])
            else:
                ids += self._texts.encode(piece, False)
        return tuple(ids)

    def unmarked(self, rendered: str) -> str:
        """What the template has written, with the names where the marks are."""
        return re.sub(re.escape(self._mark) + r"(\d+);", lambda found: self._names[int(found[1])], rendered)

    def _replaced(self, found: re.Match[str]) -> str:
        self._marked.add(found[0])
        return f"{self._mark}{self._names.index(found[0])};"


def check_roles(roles: Sequence[str], template: str) -> None:
    """Raises ApiError 400 for a role that is neither OpenAI's nor written in the chat template: templates
    that print whatever role they are given let a client put words into any mouth."""
    for role in roles:
        if role not in ROLES and role not in _quoted(template):
            given, known = printable(shorten(role, 64)), ", ".join(sorted(ROLES))
            raise bad_request(f"messages: the role {given!r} is not known; use one of {known}", "messages")


def _quoted(template: str) -> set[str]:
    """Texts in quotes of a template, which are roles where they are roles."""
    return {
        found
        for pair in re.findall(r"'([\w-]{1,64})'|\"([\w-]{1,64})\"", template)
        for found in pair
        if found
    }

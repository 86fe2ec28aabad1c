"""An answer's text taken apart as it comes: reasoning and content at once, tool calls when they are
complete.

What is given piece by piece is, put together, what is given for the whole text. A mark that may have begun
is held back until it is certain; so is white space, which templates write around the parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from draftkit.target.answer_parts import AnswerParts, AnswerStyle, Channels, call_in_json, calls_in, numbered

_TO = re.compile(r"to=functions\.([\w.-]+)")
_CHANNEL = re.compile(r"<\|channel\|>(\w+)")
_OF_CALLS = frozenset(("[ARGS]", "[CALL_ID]", '<|"|>'))  # special tokens that calls are written with
_HARMONY = dict.fromkeys(("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>"), "head")
# channels -> part of the answer -> mark that ends it -> the part that follows. A "head" says what its
# "body" is.
_MARKS: dict[Channels, dict[str, dict[str, str]]] = {
    "think": {
        "content": {"<think>": "reasoning", "<tool_call>": "call"},
        "reasoning": {"</think>": "content"},
        "call": {"</tool_call>": "content"},
    },
    "gemma": {
        "content": {"<|channel>": "head", "<|tool_call>": "call"},
        "head": {"\n": "body", "<channel|>": "content"},
        "reasoning": {"<channel|>": "content"},
        "call": {"<tool_call|>": "content"},
    },
    "mistral": {
        "content": {"[THINK]": "reasoning", "[TOOL_CALLS]": "call"},
        "reasoning": {"[/THINK]": "content"},
        "call": {"[TOOL_CALLS]": "call"},
    },
    "harmony": {
        "head": {"<|message|>": "body"},
        "content": _HARMONY,
        "reasoning": _HARMONY,
        "call": _HARMONY,
    },
}


@dataclass(frozen=True)
class AnswerDelta:
    """What a piece of text adds; tool calls are whole, in OpenAI's form."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()

    def __add__(self, other: AnswerDelta) -> AnswerDelta:
        calls = self.tool_calls + other.tool_calls
        return AnswerDelta(self.reasoning + other.reasoning, self.content + other.content, calls)


class AnswerStream:
    """Takes one answer apart. `special` are names of special tokens that the text holds and nobody said;
    `opened`: the prompt has begun the thinking; without `with_calls` calls are content."""

    def __init__(
        self, style: AnswerStyle, special: Sequence[str] = (), opened: bool = False, with_calls: bool = True
    ) -> None:
        self._style, self._special, self._with_calls = style, tuple(special), with_calls
        self._part = "head" if style.channels == "harmony" else "reasoning" if opened else "content"
        self._buffer = ""  # may begin a mark
        self._held, self._mark = "", ""  # of a head or a call, and what began it
        self._head = ""
        self._space, self._trim = "", opened  # white space: that may end a part, and that begins one
        self._reasoned = self._said = False
        self._calls = 0

    def add(self, piece: str) -> AnswerDelta:
        """What is certain after this piece."""
        self._buffer += piece
        found = AnswerDelta()
        while True:
            marks = self._marks()
            pattern, beginnings, longest = _found_by(tuple(marks))
            mark = pattern.search(self._buffer)
            if mark is None:
                sizes = range(min(longest, len(self._buffer)), 0, -1)
                end = len(self._buffer) - next((n for n in sizes if self._buffer[-n:] in beginnings), 0)
                text, self._buffer = self._buffer[:end], self._buffer[end:]
                return found + self._take(text)
            text, self._buffer = self._buffer[: mark.start()], self._buffer[mark.end() :]
            found += self._take(text)
            if mark[0] not in self._marks():  # by the text before it, it is text itself
                found += self._take(mark[0])
            elif (following := marks[mark[0]]) is not None:
                found += self._leave(mark[0])
                found += self._enter(following, mark[0])

    def finish(self) -> AnswerDelta:
        """What is left when the answer ends; a call without its end counts when it is complete."""
        found = self._take(self._buffer)
        self._buffer = ""
        if self._part == "head" and self._style.channels == "harmony" and not (self._said or self._reasoned):
            found += AnswerDelta(content=_without(self._held, (*_HARMONY, *self._special)))
        elif self._part in ("call", "bare", "head"):
            found += self._leave("")
        if not (self._reasoned or self._calls):
            found += AnswerDelta(content=self._space)
        return found

    def _marks(self) -> Mapping[str, str | None]:
        """What ends the part, or is to be dropped from it (None)."""
        if self._part == "bare":
            return {}
        own = dict(_MARKS[self._style.channels][self._part])
        if self._said or self._reasoned:
            own.pop("<think>", None)  # a thought comes first; later it is a word like others
        if not self._with_calls:
            own = {mark: following for mark, following in own.items() if following != "call"}
        if self._part in ("content", "reasoning"):
            return {**dict.fromkeys(self._special), **own}
        return own

    def _take(self, text: str) -> AnswerDelta:
        """Text of the part that is open."""
        blank = not (self._said or self._reasoned or self._calls)
        bare = self._style.bare_calls and self._with_calls and text.lstrip().startswith("{")
        if self._part == "content" and blank and bare:
            self._part, self._held = "bare", ""
        if self._part in ("head", "call", "bare"):
            self._held += text
            return AnswerDelta()
        whole = self._space + (text.lstrip() if self._trim else text)
        told = whole.rstrip()
        self._space = whole[len(told) :]
        if not told:
            return AnswerDelta()
        self._trim = False
        if self._part == "reasoning":
            self._reasoned = True
            return AnswerDelta(reasoning=told)
        self._said = True
        return AnswerDelta(content=told)

    def _leave(self, mark: str) -> AnswerDelta:
        """The part has ended, by a mark or with the answer."""
        if self._part in ("call", "bare"):
            return self._called(mark)
        found = AnswerDelta()
        if self._part == "head":
            self._head = self._held
            # no name: it is a thought
            if self._style.channels == "gemma" and self._head.strip() != "thought":
                self._enter("reasoning", "")
                found = self._take(self._head)
        if self._part == "reasoning":
            self._space, self._trim = "", True
        return found

    def _enter(self, part: str, mark: str) -> AnswerDelta:
        """Begin a part."""
        if part == "body":
            part = self._body()
        if part == "reasoning":
            self._space, self._trim = "\n" if self._reasoned else "", True
        self._part, self._mark = part, mark
        self._held = mark if part == "head" and mark == "<|channel|>" else ""
        return AnswerDelta()

    def _body(self) -> str:
        """What a message is, by its head: Gemma's are thoughts, gpt-oss's thoughts, calls or words."""
        if self._style.channels == "gemma":
            return "reasoning"
        if self._with_calls and _TO.search(self._head):
            return "call"
        channel = _CHANNEL.search(self._head)
        return "reasoning" if channel is not None and channel[1] == "analysis" else "content"

    def _called(self, mark: str) -> AnswerDelta:
        """The calls of the part that has ended; what is no call is content."""
        named: list[tuple[str, Any]] | None
        held = _without(self._held, [name for name in self._special if name not in _OF_CALLS])
        if self._style.channels == "harmony":
            to = _TO.search(self._head)
            named = [(to[1], held.strip())] if to else None
        elif self._part == "bare":
            one = call_in_json(held.strip(), "parameters")
            named = [one] if one else None
        else:
            named = calls_in(held, self._style.channels)
        if named is None:
            self._part, self._said = "content", True
            return self._take(self._mark + self._held + mark)
        calls = tuple(numbered(self._calls + place, *one) for place, one in enumerate(named))
        self._calls += len(calls)
        return AnswerDelta(tool_calls=calls)


def parse_answer(
    style: AnswerStyle, text: str, special: Sequence[str] = (), opened: bool = False
) -> AnswerParts:
    """Parts of a whole answer's text. A prompt may have opened the thinking: where it is closed and was never
    begun, it has."""
    before, closed, _ = text.partition("</think>")
    opened = opened or (style.channels == "think" and bool(closed) and "<think>" not in before)
    stream = AnswerStream(style, special, opened)
    found = stream.add(text) + stream.finish()
    return AnswerParts(found.content, found.reasoning or None, found.tool_calls)


def _without(text: str, names: Sequence[str]) -> str:
    for name in names:
        text = text.replace(name, "")
    return text


@lru_cache(maxsize=64)
def _found_by(marks: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """A pattern for marks, all their beginnings, and the length of the longest of these."""
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or "(?!)"
    beginnings = frozenset(mark[:size] for mark in marks for size in range(1, len(mark)))
    return re.compile(pattern), beginnings, max(map(len, beginnings), default=0)

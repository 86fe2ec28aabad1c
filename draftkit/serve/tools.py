"""Tool calls written as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen), back into
OpenAI's."""

from __future__ import annotations

import json
import uuid
from typing import Any

from draftkit.serve.detokenize import StopStrings

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def template_writes_tool_calls(tokenizer: Any) -> bool:
    """True when the chat template defines this way of calling tools."""
    return OPEN in str(tokenizer.chat_template)


class ToolCalls:
    """Splits an answer's text, piece by piece, into content and tool calls. A call is given when it is
    complete; with `only_one` those after the first are dropped."""

    def __init__(self, only_one: bool = False) -> None:
        self.calls: list[dict[str, Any]] = []
        self._only_one = only_one
        self._content = StopStrings([OPEN])
        self._call = ""  # text since OPEN
        self._inside = False

    def add(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """Content and calls that this piece completes. Text that is not a valid call comes back as
        content."""
        shown, calls = "", []
        rest = piece
        while rest:
            if not self._inside:
                held_before = self._content.flush()
                text = held_before + rest
                shown += self._content.add(text)
                rest = ""
                if self._content.found is not None:
                    rest = text[text.index(OPEN) + len(OPEN) :]
                    self._content, self._inside, self._call = StopStrings([OPEN]), True, ""
            if self._inside:
                self._call += rest
                rest = ""
                if CLOSE in self._call:
                    body, rest = self._call.split(CLOSE, 1)
                    self._inside = False
                    call = self._parse(body)
                    if call is None:
                        shown += OPEN + body + CLOSE
                    else:
                        calls += self._keep(call)
        return shown, calls

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What is left when the answer ends: a call whose end the stop token cut off counts if it is
        valid."""
        if not self._inside:
            return self._content.flush(), []
        call = self._parse(self._call)
        return ("", self._keep(call)) if call is not None else (OPEN + self._call, [])

    def _keep(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        if self._only_one and self.calls:
            return []
        self.calls.append(call)
        return [call]

    @staticmethod
    def _parse(text: str) -> dict[str, Any] | None:
        try:
            found = json.loads(text)
            name, arguments = found["name"], found.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str):
            return None
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": written},
        }

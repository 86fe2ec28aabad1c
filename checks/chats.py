"""Conversations with tools and thoughts, to show to chat templates."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where."},
                "days": {"type": "integer"},
                "near": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    },
}
_WORDS = "list value holds step return what add number".split()


def conversations(
    count: int, with_tools: bool, with_reasoning: bool, calls_at_once: int = 2
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """(messages, tools), always the same: one to three user turns, some with (parallel) tool calls before
    the answer, some with thoughts, no two of which are the same. Ids of calls have nine characters, which
    Mistral's templates ask for."""
    chance, numbers = random.Random(0), itertools.count(1000)

    def text() -> str:
        return " ".join(chance.choices(_WORDS, k=chance.randint(1, 6)))

    def said(**fields: Any) -> dict[str, Any]:
        thought = {"reasoning_content": f"{text()} {next(numbers)}"} if with_reasoning else {}
        return {"role": "assistant", **fields, **thought}

    def arguments() -> str:
        said = {"city": text(), "days": chance.randint(1, 9), "near": [text(), "Zürich"]}
        return json.dumps(said, ensure_ascii=False)

    for number in range(count):
        messages: list[dict[str, Any]] = [{"role": "system", "content": text()}] if number % 2 else []
        for _ in range(1 + number % 3):
            messages.append({"role": "user", "content": text()})
            if with_tools and number % 4 < 3:
                functions = [
                    {"name": "weather", "arguments": arguments()}
                    for _ in range(1 + number % 2 * (calls_at_once - 1))
                ]
                calls = [
                    {"id": f"call{i:05}", "type": "function", "function": f} for i, f in enumerate(functions)
                ]
                messages.append(said(content=None, tool_calls=calls))
                messages += [{"role": "tool", "tool_call_id": c["id"], "content": text()} for c in calls]
            messages.append(said(content=text()))
        yield messages, [TOOL] if with_tools else []

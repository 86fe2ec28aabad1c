"""OpenAI's messages and tools as DeepSeek's package `deepseek-recipe` has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from draftkit.target.prompt_format import Message


def message_of(recipe: Any, message: Message) -> Any:
    """A message of OpenAI's as the recipe's. Raises ValueError for what it has no place for."""
    role = message["role"]
    if role in ("system", "developer"):
        return recipe.SystemMessage(_text(message.get("content")))
    if role == "user":
        return recipe.UserMessage(_text(message.get("content")))
    if role == "tool":
        return recipe.ToolMessage(_text(message.get("content"), of_tool=True), message.get("tool_call_id"))
    if role == "latest_reminder":
        return recipe.LatestReminderMessage(_text(message.get("content")))
    if role != "assistant":
        raise ValueError(f"role {role!r}: DeepSeek-V4 has system, user, assistant, tool and latest_reminder")
    calls = [_call(recipe, c) for c in message.get("tool_calls") or ()]
    begun = bool(
        message.get("prefix") or message.get("wo_eos")
    )  # DeepSeek's API says prefix, its encoder wo_eos
    return recipe.AssistantMessage(_text(message.get("content")), reasoning_of(message), calls or None, begun)


def _text(content: Any, of_tool: bool = False) -> str:
    """A message's content; text parts are joined by an empty line. Raises ValueError for other parts."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if isinstance(text, str):
            texts.append(text)
        elif of_tool:
            texts.append(f"[Unsupported {kind}]")
        else:
            raise ValueError(f"content part of type {kind!r}: text parts only can be shown")
    return "\n\n".join(texts)


def reasoning_of(message: Message) -> str | None:
    """What an assistant's message says it thought."""
    return message.get("reasoning_content") or message.get("reasoning")


def schema_of(message: Message) -> Any:
    """The schema of a message's `response_format`. Raises ValueError when that is no object."""
    asked = message["response_format"]
    if not isinstance(asked, Mapping):
        raise ValueError(f"response_format is a {type(asked).__name__}, must be an object")
    return asked["json_schema"].get("schema", {}) if asked.get("type") == "json_schema" else asked


def tool_of(recipe: Any, tool: Mapping[str, Any]) -> Any:
    """A tool of OpenAI's as the recipe's."""
    function = tool.get("function", tool)
    return recipe.ToolDefinition(
        function["name"], function.get("description"), function.get("parameters"), function.get("strict")
    )


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _call(recipe: Any, call: Mapping[str, Any]) -> Any:
    """A call of the history. Raises ValueError when it has no function, or arguments that are no JSON
    object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError('tool_calls must be {"type": "function", "function": {"name": "...", ...}}')
    arguments = function.get("arguments") or "{}"
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    try:
        fits = isinstance(json.loads(written, parse_constant=_no_number), dict)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"tool_calls.function.arguments of {function.get('name')!r} is not a JSON object")
    return recipe.ToolCall(str(call.get("id") or ""), function["name"], written)

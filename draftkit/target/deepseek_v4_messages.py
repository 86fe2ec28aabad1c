"""OpenAI's messages and tools as DeepSeek's package `deepseek-recipe` has them, and the fields of messages
that DeepSeek-V4 has beyond OpenAI's: `task` (its quick instructions), `response_format` and `prefix`.

The fields are checked here for all: files of conversations, the server and `LLM`. Other programs write keys
of these names, too: a value that is not DeepSeek-V4's own is wrong for a DeepSeek-V4 target alone, and means
nothing to any other (`fields_of`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftkit.target.prompt_format import Message

FIELDS = ("task", "response_format", "prefix")
TASKS = ("action", "query", "authority", "domain", "read_url", "title")
_OWN: dict[str, Callable[[Any], bool]] = {
    "task": lambda value: value in TASKS,
    "response_format": lambda value: isinstance(value, Mapping) and bool(value),
    "prefix": lambda value: value is True,
}
_OWNERS = {
    "task": ("user",),
    "title": ("assistant",),  # a task, too
    "response_format": ("system", "developer"),
    "prefix": ("assistant",),
}


def fields_of(message: Message) -> dict[str, Any]:
    """Those of FIELDS that a message has with a value of DeepSeek-V4's own: one of TASKS, an object that is
    not empty, a prefix that is true."""
    return {name: value for name, value in given_fields(message).items() if _OWN[name](value)}


def given_fields(message: Message) -> dict[str, Any]:
    """Those of FIELDS that a message has with any value. What is null, and a prefix that is false, it has
    not; DeepSeek's encoder calls a prefix `wo_eos`."""
    prefix = message.get("prefix")
    if prefix is None or prefix is False:
        prefix = message.get("wo_eos")
    found = {name: message.get(name) for name in FIELDS} | {"prefix": None if prefix is False else prefix}
    return {name: value for name, value in found.items() if value is not None}


def asks(message: Message) -> bool:
    """Whether what comes next is about this very message: an answer to its task, or what follows its
    prefix."""
    return not fields_of(message).keys().isdisjoint(("task", "prefix"))


def check_request(
    messages: Sequence[Message], switches: Mapping[str, Any], answer: Message | None = None
) -> None:
    """Raise ValueError when FIELDS have values that they cannot have, or stand where a request to DeepSeek-V4
    that is shown with these switches, or its answer, cannot have them."""
    for place, message in enumerate([*messages, answer] if answer else messages):
        if given_fields(message):
            try:
                _check(message, switches)
            except ValueError as error:
                raise ValueError(f"messages[{place}]: DeepSeek-V4's {error}") from None
    for message in messages[:-1]:
        if asks(message):
            name = "task" if "task" in fields_of(message) else "prefix"
            raise ValueError(f"only the last message may have a {name}, before the answer to it")
    if sum("response_format" in fields_of(message) for message in messages) > 1:
        raise ValueError("only one message may have a response_format")


def check_conversation(messages: Sequence[Message], switches: Mapping[str, Any]) -> None:
    """`check_request` of a conversation, whose last message may be the answer."""
    answered = messages[-1]["role"] == "assistant" and not asks(messages[-1])
    check_request(*(messages[:-1], switches, messages[-1]) if answered else (messages, switches))


def _check(message: Message, switches: Mapping[str, Any]) -> None:
    """Raise ValueError when a message cannot have the values of FIELDS that it has."""
    found, role = given_fields(message), message.get("role")
    task = found.get("task")
    if "task" in found and task not in TASKS:
        raise ValueError(f"task {task!r:.40} is not known, choose one of {', '.join(TASKS)}, or remove it")
    if found.get("prefix", True) is not True:
        raise ValueError(f"prefix is {found['prefix']!r:.40}, must be true or false; change or remove it")
    if "response_format" in found:
        schema_of(message)
    for name in found:
        owners = _OWNERS["title" if (name, task) == ("task", "title") else name]
        if role not in owners:
            what = f"task {task!r}" if name == "task" else name
            raise ValueError(f"{what} belongs to a message of the {owners[0]}; move or remove it")
    if task not in (None, "action") and switches.get("thinking", switches.get("enable_thinking")):
        raise ValueError(f"task {task!r} is answered without thinking; leave the switch thinking out")
    if "prefix" in found and task is not None:
        raise ValueError(f"task {task!r} comes after a whole answer; leave prefix out")
    if "prefix" in found or task == "title":
        what, use = ("prefix", "go on with") if "prefix" in found else ("task 'title'", "give a title to")
        if message.get("tool_calls"):
            raise ValueError(f"{what}: after its tool_calls an answer ends; leave one of the two out")
        if not (_text(message.get("content")) or ("prefix" in found and reasoning_of(message))):
            raise ValueError(f"{what}: the message has no content to {use}; leave it out")


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
    begun = "prefix" in fields_of(message)
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
    """What the model is shown of a message's `response_format`: the schema in it, or all of it (a schema
    itself, or {"type": "json_object"}); None for {"type": "text"}, which asks for nothing. Raises ValueError
    when that is no object, or has no schema."""
    asked = message["response_format"]
    if not isinstance(asked, Mapping):
        raise ValueError(
            f"response_format is a {type(asked).__name__}, must be an object; change or remove it"
        )
    if not asked:
        raise ValueError('response_format is empty; give {"type": "json_object"} or a schema, or remove it')
    if asked.get("type") != "json_schema":
        return None if asked.get("type") == "text" else asked
    about = asked.get("json_schema")
    if not isinstance(about, Mapping) or not isinstance(about.get("schema"), Mapping):
        raise ValueError("response_format of type json_schema needs json_schema.schema, an object")
    return about["schema"]


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

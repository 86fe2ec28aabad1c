"""Rows as data sets have them, made into conversations.

Forms: OpenAI messages (`messages`, with `tools`), ShareGPT (`conversations` of `from`/`value` or
`role`/`content`, with `system` and `tools`), `turns` (the user's side), `prompt` with or without `response`
or `completion`, and records of `draftkit generate`. A column that is null is absent. Everything that is wrong
raises DataError with the field's place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from draftkit.data.lines import NESTED, NestedError, json_value
from draftkit.data.messages import ROLES, Conversation, Message, WrittenTurn
from draftkit.errors import DataError
from draftkit.target.deepseek_v4_messages import FIELDS, check_conversation, fields_of, given_fields
from draftkit.target.prompt_format import content_text

_SPEAKERS = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "function": "tool",
}
_ANSWERS = ("response", "completion", "answer", "output")
_FORMS = ("messages", "conversations", "turns", "prompt", "instruction")


def conversation_of(
    row: Any, where: str, stem: str, switches: Mapping[str, Any] | None = None
) -> Conversation:
    """The conversation in a row. `where` names it in errors, `stem` is the domain of rows that give none;
    `switches`: those of the DeepSeek-V4 target that it will be shown to. None: another one, or none is known,
    and what is not DeepSeek-V4's own of its messages' fields is left out."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: is a {type(row).__name__}, must be a JSON object")
    row = {k: v for k, v in row.items() if v is not None}
    form = next((name for name in _FORMS if name in row), None)
    if form is None:
        raise DataError(f"{where}: needs one of the keys {', '.join(_FORMS)}")
    messages = _FORM_READERS[form](row, where)
    if not any(m.role == "user" for m in messages):
        raise DataError(f"{where}: has no user turn")
    for key in ("id", "domain"):
        if not isinstance(row.get(key, ""), str | int):
            raise DataError(f"{where}: {key} is a {type(row[key]).__name__}, must be a string")
    if switches is None:
        messages = [_with_own_fields(m) for m in messages]
    else:
        try:
            check_conversation([m.as_dict() for m in messages], switches)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
    tools = _tools(row.get("tools", row.get("functions", [])), where)
    turns = _turns(row, where)
    reason = row.get("finish_reason", turns[-1].finish_reason if turns else None)
    made_with = row.get("switches")
    if not isinstance(made_with, dict | None):
        raise DataError(
            f"{where}: switches is a {type(made_with).__name__}, must be an object of template switches"
        )
    text = json.dumps([[m.as_dict() for m in messages], tools], ensure_ascii=False)
    _check_characters(f"{row.get('id')}{row.get('domain')}{text}", where)
    identity = str(row.get("id", ""))
    if not identity:
        identity = f"{stem}-{where.rsplit(':', 1)[1]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    domain = str(row.get("domain") or stem)
    return Conversation(
        identity, domain, tuple(messages), tools, turns, str(reason) if reason else None, made_with
    )


def _from_messages(row: dict[str, Any], where: str) -> list[Message]:
    return [_message(m, f"{where}: messages[{i}]") for i, m in _items(row, "messages", where)]


def _from_sharegpt(row: dict[str, Any], where: str) -> list[Message]:
    found: list[Message] = []
    if row.get("system"):
        found.append(_message({"role": "system", "content": row["system"]}, f"{where}: system"))
    for i, raw in _items(row, "conversations", where):
        place = f"{where}: conversations[{i}]"
        if isinstance(raw, dict) and "from" not in raw and "role" in raw:
            found.append(_message(raw, place))
        else:
            found.append(_spoken(raw, place))
    return found


def _from_turns(row: dict[str, Any], where: str) -> list[Message]:
    return [
        _message({"role": "user", "content": t}, f"{where}: turns[{i}]")
        for i, t in _items(row, "turns", where)
    ]


def _from_prompt(row: dict[str, Any], where: str) -> list[Message]:
    answer = next((name for name in _ANSWERS if name in row), None)
    return _side(row, "prompt", "user", where) + (_side(row, answer, "assistant", where) if answer else [])


def _from_instruction(row: dict[str, Any], where: str) -> list[Message]:
    parts = [row["instruction"], row.get("input", "")]
    if not all(isinstance(p, str) for p in parts):
        raise DataError(f"{where}: instruction and input must be strings")
    return _from_prompt(row | {"prompt": "\n\n".join(p for p in parts if p)}, where)


_FORM_READERS = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "turns": _from_turns,
    "prompt": _from_prompt,
    "instruction": _from_instruction,
}


def _side(row: dict[str, Any], key: str, role: str, where: str) -> list[Message]:
    """A column that is a text, or a list of messages."""
    if isinstance(row[key], list):
        return [_message(m, f"{where}: {key}[{i}]") for i, m in _items(row, key, where)]
    return [_message({"role": role, "content": row[key]}, f"{where}: {key}")]


def _items(row: dict[str, Any], key: str, where: str) -> list[tuple[int, Any]]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key} must be a list with at least one turn")
    return list(enumerate(value))


def _spoken(raw: Any, where: str) -> Message:
    """A turn of ShareGPT's."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: is a {type(raw).__name__}, must be an object")
    speaker, value = raw.get("from"), raw.get("value")
    role = _SPEAKERS.get(str(speaker))
    if role is None:
        raise DataError(f"{where}: from {speaker!r} is not known; speakers are {', '.join(_SPEAKERS)}")
    if speaker != "function_call":
        return _message({"role": role, "content": value} | given_fields(raw), where)
    calls = _json(value, where) if isinstance(value, str) else value
    listed = calls if isinstance(calls, list) else [calls]
    return _message(
        {"role": role, "tool_calls": [{"type": "function", "function": c} for c in listed]}, where
    )


def _message(raw: Any, where: str) -> Message:
    """A message of OpenAI's; content may be a text, a list of text parts, or null in an assistant's turn."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: is a {type(raw).__name__}, must be an object")
    raw = {k: v for k, v in raw.items() if v is not None}
    role, given = raw.get("role"), raw.get("content")
    if role == "function":
        role = "tool"
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is not known; roles are {', '.join(ROLES)}")
    if not isinstance(given, str | list | None) or (not given and role in ("user", "system", "developer")):
        raise DataError(
            f"{where}: content must be a non-empty string or a list of text parts, is {given!r:.40}"
        )
    try:
        content = content_text(given) if given is not None else None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    calls = raw.get("tool_calls") or (
        [{"function": raw["function_call"]}] if raw.get("function_call") else []
    )
    reasoning = next((raw[k] for k in ("reasoning_content", "reasoning", "thinking") if raw.get(k)), None)
    for name in ("reasoning_content", "name", "tool_call_id"):
        value = reasoning if name == "reasoning_content" else raw.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {name} is a {type(value).__name__}, must be a string")
    weight = raw.get("weight")
    if not isinstance(weight, int | float | None):
        raise DataError(f"{where}: weight is {weight!r:.20}, must be a number")
    refusal = raw.get("refusal") if role == "assistant" and not content else None
    return Message(
        str(role),
        str(refusal) if refusal else content,
        reasoning,
        _calls(calls, where),
        raw.get("tool_call_id"),
        raw.get("name"),
        weight,
        **given_fields(raw),
    )


def _with_own_fields(message: Message) -> Message:
    """The message without values of DeepSeek-V4's fields that are not its own: another program's keys."""
    given = {name: value for name in FIELDS if (value := getattr(message, name)) is not None}
    nothing: dict[str, Any] = dict.fromkeys(given.keys() - fields_of(given).keys())
    return replace(message, **nothing) if nothing else message


def _calls(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(given, list):
        raise DataError(f"{where}: tool_calls must be a list of calls, is {given!r:.40}")
    return tuple(_call(call, i, f"{where}: tool_calls[{i}]") for i, call in enumerate(given))


def _call(raw: Any, number: int, where: str) -> dict[str, Any]:
    """A call of OpenAI's form, arguments as JSON text."""
    function = raw.get("function") if isinstance(raw, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise DataError(
            f'{where}: must be {{"function": {{"name": "...", "arguments": "..."}}}}, is {raw!r:.60}'
        )
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):
        if not isinstance(_json(arguments, f"{where}: arguments"), dict):
            raise DataError(f"{where}: arguments must be a JSON object, are {arguments!r:.40}")
    elif isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        raise DataError(f"{where}: arguments must be JSON text or an object, are {arguments!r:.40}")
    identity = raw.get("id")
    return {
        "id": str(identity) if identity is not None else f"call_{number}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _tools(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Tools of a request; as JSON text, too, and as bare functions."""
    listed = _json(given, f"{where}: tools") if isinstance(given, str) and given.strip() else given or []
    if not isinstance(listed, list):
        raise DataError(f"{where}: tools must be a list, is {listed!r:.40}")
    found = []
    for i, tool in enumerate(listed):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{where}: tools[{i}] must be {{"type": "function", "function": {{"name": ...}}}}, is '
                f"{tool!r:.60}"
            )
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(found)


def _turns(row: dict[str, Any], where: str) -> tuple[WrittenTurn, ...]:
    """The token ids of a record: `answers`, or for one answer the same fields in the row itself."""
    listed = row.get("answers")
    given = listed if isinstance(listed, list) else []
    several = any(isinstance(a, dict) and "answer_ids" in a for a in given)
    if not several and "answer_ids" not in row:
        return ()
    given = given if several else [row]
    found = []
    for i, turn in enumerate(given):
        place = f"{where}: answers[{i}]" if several else where
        if not isinstance(turn, dict):
            raise DataError(f"{place}: is a {type(turn).__name__}, must be an object")
        prompt_ids, answer_ids = (
            _ids(turn.get(name), f"{place}: {name}") for name in ("prompt_ids", "answer_ids")
        )
        found.append(WrittenTurn(prompt_ids, answer_ids, str(turn.get("finish_reason") or "stop")))
    return tuple(found)


def _ids(given: Any, where: str) -> tuple[int, ...]:
    if not isinstance(given, list) or set(map(type, given)) - {int} or min(given, default=0) < 0:
        raise DataError(f"{where} must be a list of token ids, is {given!r:.40}")
    return tuple(given)


def _json(text: str, where: str) -> Any:
    try:
        return json_value(text, NESTED // 2)  # it becomes a part of a row that is read again
    except NestedError as error:
        raise DataError(f"{where}: is {error}") from error
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error!s:.60}): {text!r:.40}") from error


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write a lone surrogate, "\ud800"; nothing after it can
        raise DataError(
            f"{where}: holds half a character ({error.object[error.start]!a}); remove it"
        ) from error

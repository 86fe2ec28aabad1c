"""An answer's text taken apart: reasoning, content and tool calls, in the ways that chat templates write
them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class AnswerParts:
    """What the assistant said; tool calls in OpenAI's form, numbered from call_0, arguments as JSON text."""

    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()

    def message(self) -> dict[str, Any]:
        """As an assistant's message of OpenAI's."""
        said: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            said["reasoning_content"] = self.reasoning
        if self.tool_calls:
            said |= {"tool_calls": list(self.tool_calls), "content": self.content or None}
        return said


Channels = Literal["think", "harmony", "gemma", "mistral"]
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_MISTRAL_CALL = re.compile(r"([\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\](.*)", re.DOTALL)
_GEMMA_CALL = re.compile(r"call:([\w.-]+)(\{.*\})", re.DOTALL)
_GEMMA_TEXT = '<|"|>'


@dataclass(frozen=True)
class AnswerStyle:
    """How a template's family marks the parts of an answer."""

    channels: Channels = "think"
    thinks: bool = False  # the template knows thoughts
    calls: bool = False  # and a form of calls
    json_calls: bool = False  # which is <tool_call> with JSON (Hermes, Qwen): what a grammar can demand
    bare_calls: bool = field(default=False)  # Llama 3: the whole answer is the JSON of a call

    @classmethod
    def of_template(cls, source: str) -> AnswerStyle:
        """The style that a template's text shows."""
        if "<|channel|>" in source and "<|message|>" in source:
            return cls("harmony", thinks=True, calls="functions." in source)
        if "<|channel>" in source and "<channel|>" in source:
            return cls("gemma", thinks=True, calls="<|tool_call>" in source)
        if "[TOOL_CALLS]" in source or "[THINK]" in source:
            return cls("mistral", thinks="[THINK]" in source, calls="[TOOL_CALLS]" in source)
        tags = "<tool_call>" in source
        bare = '"parameters": ' in source and not tags
        other = "<function=" in source or "<arg_key>" in source
        return cls("think", "</think>" in source, tags or bare, tags and not other, bare)

    @property
    def marks(self) -> tuple[str, ...]:
        """What stands between the parts; some tokenizers have special tokens for it."""
        return {
            "think": ("<think>", "</think>", "<tool_call>", "</tool_call>"),
            "gemma": ("<|channel>", "<channel|>", "<|tool_call>"),
            "harmony": ("<|channel|>", "<|message|>"),
            "mistral": ("[TOOL_CALLS]", "[THINK]"),
        }[self.channels]


def numbered(number: int, name: str, arguments: Any) -> dict[str, Any]:
    """A call in OpenAI's form, by its number in the answer."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": written}}


def calls_in(body: str, channels: Channels) -> list[tuple[str, Any]] | None:
    """(name, arguments) of the calls that stand between their marks; None when they are not well formed."""
    if channels == "mistral":
        return _mistral_calls(body)
    one = _gemma_call(body) if channels == "gemma" else _call_in_tags(body.strip())
    return [one] if one else None


def _call_in_tags(body: str) -> tuple[str, Any] | None:
    """Name and arguments of what stands between <tool_call> and </tool_call>: JSON (Hermes, Qwen3), XML
    (Qwen3-Coder), or a name with <arg_key> pairs (GLM)."""
    if function := _FUNCTION.search(body):
        return function[1].strip(), {
            key.strip(): _value(value) for key, value in _PARAMETER.findall(function[2])
        }
    if "<arg_key>" in body:
        pairs = {key.strip(): _value(value) for key, value in _ARGUMENT.findall(body)}
        return body.split("<arg_key>")[0].strip(), pairs
    return call_in_json(body, "arguments")


def call_in_json(body: str, arguments: str) -> tuple[str, Any] | None:
    """Name and arguments of {"name": ..., `arguments`: ...}; None for anything else."""
    try:
        found = json.loads(body)
        name = found["name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (name, found.get(arguments, {})) if isinstance(name, str) else None


def _value(text: str) -> Any:
    """A parameter written as text: a number, a list, ... where it is JSON, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _mistral_calls(body: str) -> list[tuple[str, Any]] | None:
    """What follows [TOOL_CALLS]: a JSON list (older tokenizers), or name[ARGS]{...} (newer ones)."""
    if named := _MISTRAL_CALL.fullmatch(body := body.strip()):
        return [(named[1], named[2])]
    try:
        return [(call["name"], call["arguments"]) for call in json.loads(body)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _gemma_call(body: str) -> tuple[str, Any] | None:
    """Gemma 4: call:name{key:<|"|>text<|"|>,other:5}, objects and lists within."""
    found = _GEMMA_CALL.fullmatch(body.strip())
    if found is None:
        return None
    try:
        arguments, rest = _gemma_value(found[2])
    except (ValueError, RecursionError):
        return None
    return (found[1], arguments) if not rest.strip() else None


def _gemma_value(text: str) -> tuple[Any, str]:
    """A value at the beginning of a text, and what follows it. Raises ValueError."""
    if text.startswith(_GEMMA_TEXT):
        said, end, rest = text[len(_GEMMA_TEXT) :].partition(_GEMMA_TEXT)
        if not end:
            raise ValueError("a text without its end")
        return said, rest
    if text[:1] not in ("{", "["):
        word = re.match(r"[^,\]}]*", text)
        said = word[0] if word else ""
        return _value(said.strip()), text[len(said) :]
    pairs: dict[str, Any] = {}
    items: list[Any] = []
    close, rest = {"{": "}", "[": "]"}[text[0]], text[1:]
    while not rest.startswith(close):
        if close == "}":
            key, colon, rest = rest.partition(":")
            if not colon:
                raise ValueError("a name without its value")
            pairs[key.strip().removeprefix(_GEMMA_TEXT).removesuffix(_GEMMA_TEXT)], rest = _gemma_value(rest)
        else:
            item, rest = _gemma_value(rest)
            items.append(item)
        if not rest.startswith((",", close)):
            raise ValueError("neither the next one nor the end")
        rest = rest.removeprefix(",")
    return (pairs if close == "}" else items), rest[1:]

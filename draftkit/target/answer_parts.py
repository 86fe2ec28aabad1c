"""An answer's text taken apart: reasoning, content and tool calls, in the ways that chat templates write
them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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
_TOOLS = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?(?P<head>[^<]*)<\|channel\|>(?P<name>\w+)(?P<to>.*?)<\|message\|>", re.DOTALL
)
_END = re.compile(r"<\|(?:end|return|call)\|>")
_TO = re.compile(r"to=functions\.([\w.-]+)")
_GEMMA = re.compile(r"<\|channel>(?:thought\n)?(.*?)<channel\|>", re.DOTALL)
_MISTRAL_THOUGHT = re.compile(r"\[THINK\](.*?)(?:\[/THINK\]|\Z)", re.DOTALL)
_MISTRAL_CALL = re.compile(r"([\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\](.*)", re.DOTALL)


@dataclass(frozen=True)
class AnswerStyle:
    """How a template's family marks the parts of an answer."""

    channels: Channels = "think"
    bare_calls: bool = field(default=False)  # Llama 3: the whole answer is the JSON of a call

    @classmethod
    def of_template(cls, source: str) -> AnswerStyle:
        """The style that a template's text shows."""
        if "<|channel|>" in source and "<|message|>" in source:
            return cls("harmony")
        if "<|channel>" in source and "<channel|>" in source:
            return cls("gemma")
        if "[TOOL_CALLS]" in source or "[THINK]" in source:
            return cls("mistral")
        return cls("think", bare_calls='"parameters": ' in source and "<tool_call>" not in source)

    def parse(self, text: str, special: Sequence[str] = ()) -> AnswerParts:
        """Parts of an answer's text, special tokens in it; those that are left in the content are taken out.
        A call that is not well formed stays content."""
        if self.channels == "harmony":
            parts = _harmony(text)
        else:
            reasoning, rest = _reasoning(text, self.channels)
            content, calls = self._calls(rest)
            parts = AnswerParts(content, reasoning, calls)
        content = parts.content
        for token in special:
            content = content.replace(token, "")
        return replace(parts, content=content.strip() if parts.tool_calls or parts.reasoning else content)

    def _calls(self, text: str) -> tuple[str, tuple[dict[str, Any], ...]]:
        if self.channels == "mistral":
            return _mistral_calls(text)
        calls: list[dict[str, Any]] = []

        def taken(match: re.Match[str]) -> str:
            found = _call_in_tags(match[1])
            if found is None:
                return match[0]
            calls.append(_call(len(calls), *found))
            return ""

        left = _TOOLS.sub(taken, text)
        if (
            not calls
            and self.bare_calls
            and (found := _call_in_json(re.sub(r"<\|\w+\|>", "", text).strip(), "parameters"))
        ):
            return "", (_call(0, *found),)
        return left, tuple(calls)


def _call(number: int, name: str, arguments: Any) -> dict[str, Any]:
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": written}}


def _reasoning(text: str, channels: Channels) -> tuple[str | None, str]:
    """The thinking of an answer and what follows it. A prompt may have opened the thinking; a cut one is
    never closed."""
    if channels == "gemma":
        thoughts = [t.strip() for t in _GEMMA.findall(text) if t.strip()]
        return "\n".join(thoughts) or None, _GEMMA.sub("", text)
    if channels == "mistral":
        thoughts = [t.strip() for t in _MISTRAL_THOUGHT.findall(text)]
        return "\n".join(thoughts) or None, _MISTRAL_THOUGHT.sub("", text)
    before, closed, after = text.partition("</think>")
    if closed:
        return before.split("<think>", 1)[-1].strip() or None, after.lstrip("\n")
    if before.lstrip().startswith("<think>"):
        return before.split("<think>", 1)[1].strip() or None, ""
    return None, text


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
    return _call_in_json(body, "arguments")


def _call_in_json(body: str, arguments: str) -> tuple[str, Any] | None:
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
    except ValueError:
        return text


def _harmony(text: str) -> AnswerParts:
    """gpt-oss: analysis is reasoning, final is content, commentary to a function is a call."""
    thoughts: list[str] = []
    said: list[str] = []
    calls: list[dict[str, Any]] = []
    for name, to, body in _channel_bodies(text):
        if function := _TO.search(to):
            calls.append(_call(len(calls), function[1], body.strip()))
        elif name == "analysis":
            thoughts.append(body)
        else:
            said.append(body)
    if not (thoughts or said or calls):
        said = [_END.sub("", text)]
    return AnswerParts("".join(said), "\n".join(thoughts) or None, tuple(calls))


def _channel_bodies(text: str) -> Iterator[tuple[str, str, str]]:
    """(channel, recipient, body) of every message of an answer."""
    heads = list(_CHANNEL.finditer(text))
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        body = text[head.end() : following.start() if following else len(text)]
        yield head["name"], head["head"] + head["to"], _END.split(body)[0]


def _mistral_calls(text: str) -> tuple[str, tuple[dict[str, Any], ...]]:
    """[TOOL_CALLS] with a JSON list (older tokenizers), or once for each call as name[ARGS]{...} (newer
    ones)."""
    content, *written = text.split("[TOOL_CALLS]")
    calls: list[dict[str, Any]] = []
    for part in (w.replace("</s>", "").strip() for w in written):
        named = _MISTRAL_CALL.fullmatch(part)
        try:
            listed = (
                [(named[1], named[2])] if named else [(c["name"], c["arguments"]) for c in json.loads(part)]
            )
        except (ValueError, KeyError, TypeError):
            return text, ()
        calls += [_call(len(calls) + i, *one) for i, one in enumerate(listed)]
    return content, tuple(calls)

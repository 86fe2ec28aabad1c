"""From messages to token ids and back, as the target was taught to speak: the prompt format.

Everything that shows the target a conversation goes through `PromptFormat`: generation, capture, validation,
evaluation, calibration, the server and `LLM`. `template_format.py` runs Jinja chat templates,
`deepseek_v4_prompts.py` DeepSeek's own encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, Protocol

from draftkit.errors import DataError
from draftkit.target.answer_parts import AnswerParts
from draftkit.target.answer_stream import AnswerStream
from draftkit.target.deepseek_v4_messages import fields_of

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
# Calls that a grammar can demand: JSON in <tool_call> (Hermes, Qwen), DeepSeek's own form.
CallForm = Literal["json", "dsml"]


class TemplateError(DataError):
    """The chat template refuses a conversation: it is a program, and may raise anything. `reason` is what it
    said."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the chat template refuses it ({reason}); change or remove it")
        self.reason = reason


class RewrittenError(DataError):
    """The chat template writes something else than the target would have written, so nobody can say who wrote
    what."""


@dataclass(frozen=True)
class Turn:
    """One answer in the context in which it is served: the prompt's token ids, and those that the assistant
    writes, its end-of-turn token included where it wrote one."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


class PromptFormat(Protocol):
    """How a target is shown messages (OpenAI's, as dicts) and tools. `switches` are the template's own
    variables."""

    tokenizer: Any
    switches: dict[str, Any]  # template variables, as `enable_thinking`, that every stage must agree on
    today: date | None  # what a template that prints the date gets; None: the clock's

    @property
    def digest(self) -> str:
        """sha256 of everything that decides how messages are written, but for the switches."""
        ...

    @property
    def call_form(self) -> CallForm | None:
        """How calls that are demanded are written; None: they cannot be."""
        ...

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> tuple[int, ...]:
        """Token ids up to where the assistant begins to write. Raises TemplateError."""
        ...

    def turns(self, messages: Sequence[Message], tools: Tools | None = None, cut: bool = False) -> list[Turn]:
        """Every answer of a conversation in its own context, in order; `cut`: the last one did not come to
        its end.

        Raises TemplateError, or RewrittenError when an answer cannot be found again in what the template
        writes.
        """
        ...

    def parse(self, answer_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> AnswerParts:
        """The reasoning, content and tool calls of the answer to a prompt."""
        ...

    def reader(self, prompt_ids: Sequence[int] = (), with_calls: bool = True) -> AnswerStream:
        """What takes the text of the answer to a prompt apart as it comes."""
        ...

    def unshown(self, messages: Sequence[Message], tools: Tools | None = None) -> tuple[str, ...]:
        """What of a conversation the target is not shown, by OpenAI's names ("tools", "tool_calls", ...)."""
        ...


def content_text(content: Any) -> str:
    """A message's content as one string; text parts are joined by line ends. Raises ValueError for parts that
    are not text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise ValueError(f"content part of type {kind!r}: text parts only can be shown")
        texts.append(text)
    return "\n".join(texts)


def call_with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates print it. Raises ValueError when they are no
    JSON."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError:
            raise ValueError("tool_calls.function.arguments is not valid JSON") from None
    return {**call, "function": function}


def is_answer(messages: Sequence[Message], place: int) -> bool:
    """Whether the assistant answers somebody here, says something, and is to be learnt from. A prefix is
    given to it."""
    message = messages[place]
    if message["role"] != "assistant" or message.get("weight") == 0 or "prefix" in fields_of(message):
        return False
    says = message.get("content") or message.get("tool_calls") or message.get("reasoning_content")
    return bool(says) and any(m["role"] in ("user", "tool") for m in messages[:place])

"""OpenAI's Responses API: the request, and the chat that it asks for. Nothing is kept between requests, so
what names an earlier response is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from draftkit.serve.limits import MAX_MESSAGES, MAX_NAME, MAX_TOOLS
from draftkit.serve.messages import one_of
from draftkit.serve.problem import Refusal, bad_request, shorten
from draftkit.serve.protocol import INT64, Body, ChatBody, Finite, RequestBody
from draftkit.serve.wire import as_chat

_KEPT = "; this server keeps no responses: send the whole conversation as input"
_REFUSED = {  # fields that would change the answer
    "previous_response_id": _KEPT,
    "conversation": _KEPT,
    "prompt": "; send instructions and input",
    "background": "; wait for the answer or stream it",
    "context_management": "; shorten the input yourself",
    "moderation": "",
    "top_logprobs": "; /v1/chat/completions has log probabilities",
}
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_FUNCTIONS = 'this server runs no tools; give functions, as {"type": "function", "name": ...}'


# what the chat calls fields of a response's request
CHAT_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}


class Reasoning(Body):
    """How much to think. Summaries are not made: thoughts are told as they are."""

    effort: Annotated[str, Field(max_length=MAX_NAME)] | None = None


class TextConfig(Body):
    """The form of the answer's text."""

    format: dict[str, Any] | None = None


class FunctionTool(Body):
    """A function that the model may call."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Body):
    """`tool_choice` with a function's name."""

    type: Literal["function"]
    name: str


class ResponsesBody(RequestBody):
    """POST /v1/responses."""

    input: Annotated[
        str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)],
        one_of("a text or a list of items (messages, function_call, function_call_output, reasoning)"),
    ]
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedChoice | None,
        one_of('\'auto\', \'none\', \'required\' or {"type": "function", "name": "..."}'),
    ] = None
    parallel_tool_calls: bool = True
    max_output_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    temperature: Finite | None = Field(default=None, ge=0)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, Any] | None = None
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, data: Any) -> Any:
        """Refuses what would have to be ignored and would change the answer."""
        if isinstance(data, dict):
            for name, advice in _REFUSED.items():
                if data.get(name):
                    raise Refusal(name, f"{name} is not supported by this server{advice or '; leave it out'}")
            if data.get("truncation") not in (None, "disabled"):
                raise Refusal("truncation", "truncation: this server cuts no input; give 'disabled'")
        return data

    def chat(self) -> ChatBody:
        """The same request as a chat. Raises ApiError 400."""
        return as_chat(
            {
                "model": self.model,
                "messages": messages_of(self.instructions, self.input),
                "tools": [_tool(place, tool) for place, tool in enumerate(self.tools or [])] or None,
                "tool_choice": self._choice(),
                "parallel_tool_calls": self.parallel_tool_calls,
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "response_format": self._format(),
                "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            },
            self.stream,
        )

    def _choice(self) -> Any:
        if isinstance(self.tool_choice, NamedChoice):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _format(self) -> dict[str, Any] | None:
        """Chat's `response_format`, which has the schema's fields one level further in."""
        asked = self.text.format if self.text else None
        if not asked or asked.get("type") != "json_schema":
            return asked
        return {"type": "json_schema", "json_schema": {k: v for k, v in asked.items() if k != "type"}}


def _tool(place: int, tool: FunctionTool) -> dict[str, Any]:
    if tool.type != "function" or not tool.name:
        what = shorten(tool.type if tool.type != "function" else "a function without a name", 64)
        raise bad_request(f"tools.{place}: {what} is not supported: {_FUNCTIONS}", "tools")
    function = tool.model_dump(exclude_none=True, exclude={"type"})
    return {"type": "function", "function": function}


def messages_of(instructions: str | None, given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages of a response's input. Thoughts, text and calls that follow each other are one message of
    the assistant's, as they were one answer. Raises ApiError 400 for items that are something else."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages: list[dict[str, Any]] = []
    first = [instructions] if instructions else []  # many templates know one system message, at the beginning
    for place, item in enumerate(items):
        where = f"input.{place}"
        kind = item.get("type", "message")
        if kind == "message":
            _add_message(first, messages, item, where)
        elif kind == "reasoning":
            thought = _text(item.get("content") or item.get("summary") or [], where)
            if thought:
                said = _answer(messages, fresh=("content", "tool_calls"))
                said.setdefault("reasoning_content", []).append(thought)
        elif kind == "function_call":
            said = _answer(messages, fresh=())
            called = {"name": _word(item, "name", where), "arguments": _word(item, "arguments", where)}
            call = {"id": _word(item, "call_id", where), "type": "function", "function": called}
            said.setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            told = {"role": "tool", "tool_call_id": _word(item, "call_id", where)}
            messages.append({**told, "content": _text(item.get("output"), where)})
        else:
            known = "message, function_call, function_call_output, reasoning"
            raise bad_request(
                f"{where}: items of type {shorten(str(kind), 64)!r} are not supported; known are {known}",
                "input",
            )
    for message in messages:
        if "reasoning_content" in message:
            message["reasoning_content"] = "\n".join(message["reasoning_content"])
    return [{"role": "system", "content": "\n\n".join(first)}, *messages] if first else messages


def _add_message(first: list[str], messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    role, content = _word(item, "role", where), _text(item.get("content"), where)
    if role == "assistant":
        _answer(messages, fresh=("content", "tool_calls"))["content"] = content
    elif not messages and (role == "system" or (first and role == "developer")):
        first.append(content)
    else:
        messages.append({"role": role, "content": content})


def _answer(messages: list[dict[str, Any]], fresh: tuple[str, ...]) -> dict[str, Any]:
    """The assistant's message that is being put together; a new one where the last has any of `fresh`."""
    if not messages or messages[-1]["role"] != "assistant" or any(messages[-1].get(name) for name in fresh):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(content: Any, where: str) -> str:
    """The text of a content, or of a function's output: a text, or parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where}: must have a text or a list of parts", "input")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        said = part.get("refusal" if kind == "refusal" else "text") if kind in (*_TEXTS, "refusal") else None
        if not isinstance(said, str):
            raise bad_request(
                f"{where}: parts of type {shorten(str(kind), 64)!r} cannot be read here; give text",
                "input",
            )
        texts.append(said)
    return "".join(texts)


def _word(item: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(item.get(name), str):
        raise bad_request(f"{where}.{name}: must be a text", "input")
    return str(item[name])

"""Anthropic's Messages API: the request, and the chat that it asks for."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from draftkit.serve.limits import MAX_MESSAGES, MAX_NAME, MAX_STOPS, MAX_TOOLS
from draftkit.serve.messages import one_of
from draftkit.serve.problem import Refusal, bad_request, shorten
from draftkit.serve.protocol import INT64, Body, ChatBody, Finite, RequestBody, Word
from draftkit.serve.wire import as_chat

_REFUSED = {
    "container": "",
    "mcp_servers": "; give the servers' functions as tools",
}
# what the chat calls fields of a message's request
CHAT_NAMES = {
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "chat_template_kwargs": "thinking",
}
Blocks = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Content = Annotated[
    str | Blocks, one_of('a text or a list of blocks such as {"type": "text", "text": "..."}')
]


class Turn(Body):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Content


class AnthropicTool(Body):
    """A tool of the client's."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Body):
    """Whether tools must be used, and how many at a time."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Whether to think first. A budget is not a limit here."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputConfig(Body):
    """How much to think, and the form of the answer."""

    effort: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    format: dict[str, Any] | None = None


class CountBody(RequestBody):
    """POST /v1/messages/count_tokens: what a prompt is made of."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Content | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, data: Any) -> Any:
        """Refuses what would have to be ignored and would change the answer."""
        for name, advice in _REFUSED.items():
            if isinstance(data, dict) and data.get(name):
                raise Refusal(name, f"{name} is not supported by this server{advice or '; leave it out'}")
        return data

    def chat(self) -> ChatBody:
        """The same request as a chat. Raises ApiError 400."""
        return as_chat(self._fields(), False)

    def _fields(self) -> dict[str, Any]:
        messages = messages_of(self.system, self.messages)
        config = self.output_config or OutputConfig()
        begun = messages[-1]["role"] == "assistant"  # the answer goes on from here
        return {
            "model": self.model,
            "messages": messages,
            "tools": [_tool(place, tool) for place, tool in enumerate(self.tools or [])] or None,
            "tool_choice": self._choice(),
            "parallel_tool_calls": not (self.tool_choice and self.tool_choice.disable_parallel_tool_use),
            "continue_final_message": begun or None,
            "add_generation_prompt": False if begun else None,
            "chat_template_kwargs": {"enable_thinking": self.thinking.type != "disabled"}
            if self.thinking
            else None,
            "reasoning_effort": config.effort,
            "response_format": _format(config.format),
        }

    def _choice(self) -> Any:
        if self.tool_choice is None:
            return None
        if self.tool_choice.type == "tool":
            if not self.tool_choice.name:
                raise bad_request('tool_choice: type "tool" needs a name', "tool_choice")
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return {"any": "required"}.get(self.tool_choice.type, self.tool_choice.type)


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=INT64)
    temperature: Finite | None = Field(default=None, ge=0)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=0, le=INT64)] | None = None
    stop_sequences: Annotated[list[Word], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False

    def chat(self) -> ChatBody:
        """The same request as a chat. Raises ApiError 400."""
        own = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
        }
        return as_chat(self._fields() | own, self.stream)


def _tool(place: int, tool: AnthropicTool) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise bad_request(
            f"tools.{place}: {shorten(tool.type or tool.name, 64)} has no input_schema of yours: this server "
            "runs no tools and knows none; give name, description and input_schema",
            "tools",
        )
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    if given.get("type") != "json_schema":
        raise bad_request("output_config.format.type: must be json_schema", "output_config")
    return {"type": "json_schema", "json_schema": {"schema": given.get("schema")}}


def messages_of(system: Any, turns: list[Turn]) -> list[dict[str, Any]]:
    """Chat messages. A tool's results are messages of their own; a turn's thoughts, text and calls are one.
    Raises ApiError 400 for blocks that are something else."""
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": _text(system, "system")})
    for place, turn in enumerate(turns):
        where = f"messages.{place}.content"
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        elif not turn.content:
            raise bad_request(f"{where}: must have a block", "messages")
        elif turn.role == "assistant":
            messages.append(_answer(turn.content, where))
        else:
            messages += _asked(turn.role, turn.content, where)
    return messages


def _answer(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant"}
    texts, thoughts = list[str](), list[str]()
    for place, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            name, arguments = block.get("name"), block.get("input", {})
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise bad_request(
                    f"{where}.{place}: tool_use needs a name and an input, an object", "messages"
                )
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            call = {"id": str(block.get("id", "")), "type": "function", "function": function}
            said.setdefault("tool_calls", []).append(call)
        elif kind != "redacted_thinking":  # nobody can read it
            texts.append(_text([block], where))
    if thoughts:
        said["reasoning_content"] = "".join(thoughts)
    return said | {"content": "".join(texts)}


def _asked(role: str, blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    texts: list[str] = []  # of the message that goes on
    for block in blocks:
        if block.get("type") == "tool_result":
            told = {"role": "tool", "tool_call_id": str(block.get("tool_use_id", ""))}
            found.append({**told, "content": _text(block.get("content") or "", where)})
        else:
            if not found or found[-1]["role"] != role:
                texts = []
                found.append({"role": role, "content": texts})
            texts.append(_text([block], where))
    return [m | {"content": "\n".join(m["content"])} if m["role"] == role else m for m in found]


def _text(content: Any, where: str) -> str:
    """The text of a content: a text, or blocks that are texts."""
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list) else [content]:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise bad_request(
                f"{where}: blocks of type {shorten(str(kind), 64)!r} cannot be read here; give text",
                where.split(".")[0],
            )
        texts.append(block["text"])
    return "\n".join(texts)

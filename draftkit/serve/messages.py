"""What a chat is made of: messages with their parts, tools and the choice among them. Fields that are not
listed are ignored, but for a message's, which go to the chat template. One that does not look for
DeepSeek-V4's own refuses these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from draftkit.serve.limits import MAX_MESSAGES, MAX_TOOLS


def one_of(what: str) -> WrapValidator:
    """For fields that may be several things: one sentence instead of what was wrong with each of them."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {what}") from None

    return WrapValidator(check)


class ContentPart(BaseModel):
    """A part of a message's content; only text can be served. An assistant's refusal is text too."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(BaseModel):
    """A chat message; fields that are not listed go to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[
        str | Annotated[list[ContentPart], Field(fail_fast=True)] | None,
        one_of('a text or a list of parts such as {"type": "text", "text": "..."}'),
    ] = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The message as it came, without what is null: prompt formats take OpenAI's form."""
        return self.model_dump(exclude_none=True)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def _a_function(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool as it came: templates print it, so that nothing in it is moved or left out."""
    function = tool.get("function")
    named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
    if tool.get("type", "function") != "function" or not named:
        raise ValueError('must be {"type": "function", "function": {"name": "...", ...}}')
    return tool


Tools = Annotated[
    list[Annotated[dict[str, Any], AfterValidator(_a_function)]], Field(max_length=MAX_TOOLS, fail_fast=True)
]


class NamedFunction(BaseModel):
    """The function that a tool choice names."""

    name: str


class NamedTool(BaseModel):
    """`tool_choice` with a function's name."""

    type: Literal["function"] = "function"
    function: NamedFunction

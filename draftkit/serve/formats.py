"""Forms that an answer must have: OpenAI's `response_format` and forced tool calls, and vLLM's
`structured_outputs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    Field,
    model_validator,
)

from draftkit.serve.messages import one_of


class JsonSchema(BaseModel):
    """The schema of a structured answer."""

    name: str = "schema"
    schema_: dict[str, Any] | None = Field(
        default=None, validation_alias=AliasChoices("schema", "json_schema")
    )
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type json_schema needs json_schema.schema")
        return self

    @property
    def binds(self) -> bool:
        """Not any text will do."""
        return self.type != "text"


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: one of a JSON schema (as an object or as text), any JSON object, a regular
    expression, a list of texts to choose from, and a grammar in GBNF or Lark."""

    json_: Annotated[dict[str, Any] | str | None, one_of("a JSON schema, as an object or as text")] = Field(
        default=None, validation_alias="json"
    )
    json_object: bool | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, fail_fast=True)] | None
    ) = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """What is not known here would be ignored, and another answer given than was asked for."""
        if isinstance(data, dict):
            unknown = sorted(name for name, value in data.items() if value and name not in _FORMS | _HARMLESS)
            if unknown:
                raise ValueError(f"{unknown[0]} is not supported by this server; leave it out")
        return data

    @model_validator(mode="after")
    def _one_form(self) -> StructuredOutputs:
        values = {name: getattr(self, "json_" if name == "json" else name) for name in _FORMS}
        # {} is a schema
        given = [name for name, value in values.items() if value is not None and value is not False]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(sorted(_FORMS))}")
        return self


_FORMS = {"json", "json_object", "regex", "choice", "grammar"}
# there is one backend, and it writes JSON on one line
_HARMLESS = {"disable_fallback", "disable_any_whitespace"}


@dataclass(frozen=True)
class ForcedCalls:
    """`tool_choice` "required", or one function by name: the answer is a call of one of these functions (each
    with `name` and the JSON schema `parameters`), with `many` one call or more."""

    functions: tuple[dict[str, Any], ...]
    many: bool


Form = ResponseFormat | StructuredOutputs | ForcedCalls

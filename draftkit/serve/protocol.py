"""Request bodies: OpenAI's fields and vLLM's extra ones. Fields that are not listed are ignored, as vLLM does.

Types are strict enough that a wrong value is a 400 here and never an exception further in.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

INT64 = 2**63 - 1
MAX_CHOICES = 128
MAX_STOPS = 32
MAX_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, le=INT64, strict=True)]
TokenIds = list[TokenId]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _listed(value: Any) -> Any:
    """One string stands for a list of one."""
    return [value] if isinstance(value, str) else value


class Body(BaseModel):
    """What all bodies have: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    """The schema of a structured answer."""

    name: str = "schema"
    schema_: dict[str, Any] | None = Field(default=None, validation_alias=AliasChoices("schema", "json_schema"))
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("response_format json_schema needs json_schema.schema")
        return self


class SamplingBody(Body):
    """Fields that completions and chat completions share."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=0, le=INT64)
    temperature: Finite | None = Field(default=None, ge=0)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=INT64)
    min_p: Finite | None = Field(default=None, ge=0, le=1)
    presence_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(default=None, ge=0.01, le=100)  # beyond, logits overflow
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    seed: int | None = Field(default=None, ge=-INT64 - 1, le=INT64)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed), Field(max_length=MAX_STOPS)] = Field(
        default_factory=list
    )
    stop_token_ids: TokenIds = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0, le=INT64)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, le=INT64)
    user: str | None = None
    # Ours. `return_spec_stats`: statistics of speculation in the response (SGLang's name is understood too).
    # `draft`: false = no speculation for this request. `return_token_origins`: stream which tokens came from where.
    return_spec_stats: bool = Field(
        default=False, validation_alias=AliasChoices("return_spec_stats", "return_spec_tokens_details")
    )
    return_token_origins: bool = False
    draft: bool = True
    # Understood in order to refuse them by name: ignoring them would change what the client gets.
    best_of: int | None = None
    use_beam_search: bool = False
    prompt_logprobs: int | None = None
    bad_words: list[str] = Field(default_factory=list)
    logits_processors: list[Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        """Clients send null for what they do not set."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _served(self) -> SamplingBody:
        for name in ("use_beam_search", "prompt_logprobs", "bad_words", "logits_processors", "structured_outputs"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is not supported by this server; use n")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


Prompt = str | TokenIds | list[str] | list[TokenIds]


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool = False
    suffix: str | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _completion_served(self) -> CompletionBody:
        if self.suffix:
            raise ValueError("suffix is not supported by this server; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs is not supported by this server; use one of them")
        if isinstance(self.prompt, list) and not self.prompt:
            raise ValueError("prompt is empty; give at least one string or token id")
        return self


class ContentPart(Body):
    """A part of a message's content; only text can be served."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """A chat message; fields that are not listed go to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: content is one string, a tool call's arguments are an object.

        Raises ValueError for parts that are not text.
        """
        import json

        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            wrong = next((p.type for p in self.content if p.type not in ("text", "input_text") or p.text is None), None)
            if wrong is not None:
                raise ValueError(f"content part of type {wrong!r}: this server takes text parts only")
            message["content"] = "\n".join(p.text or "" for p in self.content)
        message.setdefault("content", "")
        for call in message.get("tool_calls", []):
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                try:
                    function["arguments"] = json.loads(function["arguments"] or "{}")
                except ValueError:
                    raise ValueError("tool_calls.function.arguments is not valid JSON") from None
        return message


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=0, le=INT64)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    documents: list[dict[str, str]] | None = None
    reasoning_effort: str | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _chat_served(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            raise ValueError("continue_final_message and add_generation_prompt cannot both be true")
        if self.chat_template:
            raise ValueError("chat_template: this server uses the target's own template only; leave it out")
        if self.echo:
            raise ValueError("echo is not supported for chat; use /v1/completions")
        if (self.tool_choice == "required" or isinstance(self.tool_choice, dict)) and not self.tools:
            raise ValueError("tool_choice needs tools")
        if self.tool_choice == "required" or isinstance(self.tool_choice, dict):
            raise ValueError("tool_choice: this server supports 'auto' and 'none'")
        return self


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds

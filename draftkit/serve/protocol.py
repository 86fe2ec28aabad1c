"""Request bodies: OpenAI's fields and vLLM's extra ones. Fields that are not listed are ignored and named in
the log, as vLLM does, but for those of `unsupported.py`.

Types are strict enough that a wrong value is a 400 here and never an exception further in.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from draftkit.serve.formats import ForcedCalls, Form, ResponseFormat, StructuredOutputs
from draftkit.serve.limits import (
    MAX_ALLOWED_IDS,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_ENTRIES,
    MAX_LOGPROBS,
    MAX_NAME,
    MAX_PROMPTS,
    MAX_STOP_IDS,
    MAX_STOPS,
    MAX_WORD,
)
from draftkit.serve.messages import Messages, NamedTool, Tools, one_of
from draftkit.serve.problem import Refusal, shorten
from draftkit.serve.unsupported import UNSUPPORTED, refuse_unsupported

INT64 = 2**63 - 1

TokenId = Annotated[int, Field(ge=0, le=INT64, strict=True)]
# a body may have millions: the first mistake is enough
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Word = Annotated[str, Field(min_length=1, max_length=MAX_WORD)]
Name = Annotated[str, Field(max_length=MAX_NAME)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _at_most(count: int) -> BeforeValidator:
    """For objects, before their entries are read: a body has room for hundreds of thousands."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"{len(value)} entries are more than {count}")
        return value

    return BeforeValidator(check)


def _listed(value: Any) -> Any:
    """One string stands for a list of one."""
    return [value] if isinstance(value, str) else value


class Body(BaseModel):
    """Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class RequestBody(Body):
    """What all requests have. `model` may be left out. A list as the context of validation takes the names of
    fields that are ignored."""

    model: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any, info: ValidationInfo) -> Any:
        """Clients send null for what they do not set."""
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        refuse_unsupported(given)
        if isinstance(info.context, list):
            info.context.extend(name for name in given if name not in cls._names())
        return given

    @classmethod
    @cache
    def _names(cls) -> frozenset[str]:
        """Names of fields that are not unknown."""
        aliases = (field.validation_alias for field in cls.model_fields.values())
        choices = (str(c) for a in aliases if isinstance(a, AliasChoices) for c in a.choices)
        return UNSUPPORTED.union(cls.model_fields, choices)


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(RequestBody):
    """Fields that completions and chat completions share."""

    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1, le=INT64)
    temperature: Finite | None = Field(default=None, ge=0)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=INT64)
    min_p: Finite | None = Field(default=None, ge=0, le=1)
    presence_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(default=None, ge=0.01, le=100)  # beyond, logits overflow
    logit_bias: Annotated[dict[str, Bias], _at_most(MAX_BIASES)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=MAX_ALLOWED_IDS)] | None = None
    seed: int | None = Field(default=None, ge=-INT64 - 1, le=INT64)
    stop: Annotated[list[Word], Field(max_length=MAX_STOPS), BeforeValidator(_listed)] = Field(
        default_factory=list
    )
    bad_words: Annotated[list[Word], Field(max_length=MAX_BAD_WORDS)] = Field(default_factory=list)
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_IDS)] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0, le=INT64)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=INT64)
    truncation_side: Literal["left", "right"] = "left"
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    user: Name | None = None
    # Ours. `return_spec_stats`: statistics of speculation in the response (SGLang's name is understood too).
    # `draft`: false = no speculation for this request. `return_token_origins`: stream which tokens came from
    # where.
    return_spec_stats: bool = Field(
        default=False, validation_alias=AliasChoices("return_spec_stats", "return_spec_tokens_details")
    )
    return_token_origins: bool = False
    draft: bool = True
    best_of: int | None = None

    @model_validator(mode="after")
    def _served(self) -> SamplingBody:
        if self.best_of is not None and self.best_of != self.n:
            raise Refusal("best_of", "best_of is not supported by this server; use n")
        if self.stream_options is not None and not self.stream:
            raise Refusal("stream_options", "stream_options needs stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise Refusal("prompt_logprobs", "prompt_logprobs is not available in a stream; leave stream out")
        if self.truncate_prompt_tokens == 0:
            raise Refusal(
                "truncate_prompt_tokens", "truncate_prompt_tokens must be 1 or more, or -1 for as many as fit"
            )
        form = "response_format" if self.response_format is not None and self.response_format.binds else None
        if self.structured_outputs is not None:
            if form is not None:
                raise Refusal(
                    "structured_outputs",
                    f"structured_outputs cannot be combined with {form}; use one of them",
                )
            form = "structured_outputs"
        if self.allowed_token_ids and form is not None:
            raise Refusal(
                "allowed_token_ids", f"allowed_token_ids cannot be combined with {form}; use one of them"
            )
        return self

    @property
    def form(self) -> Form | None:
        """The form that the answer must have; None: any text will do."""
        asked = (
            self.response_format if self.response_format is not None and self.response_format.binds else None
        )
        return self.structured_outputs or asked


def _not_too_many(prompts: Any) -> Any:
    """Before anything is read: a body has room for millions of prompts."""
    if (
        isinstance(prompts, list)
        and prompts
        and isinstance(prompts[0], (str, list))
        and len(prompts) > MAX_PROMPTS
    ):
        raise ValueError(f"{len(prompts)} prompts are more than the {MAX_PROMPTS} that a request may have")
    return prompts


Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(fail_fast=True)]
    | Annotated[list[TokenIds], Field(fail_fast=True)],
    one_of("a text, a list of texts, a list of token ids (whole numbers from 0), or a list of such lists"),
    BeforeValidator(_not_too_many),
]


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=0, le=INT64)  # 0: the prompt alone
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _completion_served(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise Refusal(
                "max_tokens", "max_tokens must be 1 or more; 0 goes with echo, for the prompt alone"
            )
        if isinstance(self.prompt, list) and not self.prompt:
            raise Refusal("prompt", "prompt is empty; give at least one string or token id")
        return self


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT64)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None,
        one_of('\'auto\', \'none\', \'required\' or {"type": "function", "function": {"name": "..."}}'),
    ] = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    documents: (
        Annotated[list[Annotated[dict[str, str], _at_most(MAX_ENTRIES)]], Field(fail_fast=True)] | None
    ) = None
    reasoning_effort: Name | None = None
    include_reasoning: bool = True
    echo: bool = False

    @model_validator(mode="after")
    def _chat_served(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise Refusal("top_logprobs", "top_logprobs needs logprobs: true")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise Refusal(
                "continue_final_message",
                "continue_final_message and add_generation_prompt cannot both be true",
            )
        if self.echo:
            raise Refusal("echo", "echo is not supported for chat; use /v1/completions")
        if self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool):
            self._check_forced()
        return self

    def _check_forced(self) -> None:
        if not self.tools:
            raise Refusal("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.forced_calls is None:
            name = shorten(self.tool_choice.function.name)
            raise Refusal("tool_choice", f"tool_choice names the function {name!r}, which is not among tools")
        if not isinstance(self.form, ForcedCalls):
            raise Refusal(
                "tool_choice",
                "a forced tool_choice cannot be combined with another form of the answer; use 'auto'",
            )
        if self.allowed_token_ids:
            raise Refusal(
                "tool_choice",
                "a forced tool_choice cannot be combined with allowed_token_ids; use one of them",
            )

    @property
    def form(self) -> Form | None:
        """The form that the answer must have; None: any text will do."""
        return super().form or self.forced_calls

    @property
    def forced_calls(self) -> ForcedCalls | None:
        """What `tool_choice` demands of the answer."""
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        functions = tuple(t["function"] for t in self.tools or [] if name in (None, t["function"]["name"]))
        forced = functions and (name is not None or self.tool_choice == "required")
        return ForcedCalls(functions, many=name is None and self.parallel_tool_calls) if forced else None


class TokenizeBody(RequestBody):
    """POST /tokenize: a prompt, or messages through the chat template."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise Refusal("prompt", "give either prompt or messages")
        return self


class DetokenizeBody(RequestBody):
    """POST /detokenize."""

    tokens: TokenIds

"""From a request body to prompts and the engine's sampling parameters; everything that can be wrong is a 400 here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import DataError
from draftkit.serve.messages import Message
from draftkit.serve.problem import ApiError, bad_request, shorten
from draftkit.serve.protocol import ChatBody, CompletionBody, SamplingBody
from draftkit.serve.structured import GrammarConstraint
from draftkit.serve.worker import Served
from draftkit.target.prompt_format import TemplateError

_KWARGS = "chat_template_kwargs"
MIN_TEMPERATURE = 0.01  # smaller ones are lifted to it, as vLLM does; `LLM` takes them as they are
_PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


def check_model(name: str | None, served: Served) -> None:
    """404 for another model's name; no name means the one that is served."""
    if name and name != served.name:
        raise ApiError(404, f"The model `{shorten(name)}` does not exist; this server has `{served.name}`.", "model")


def completion_prompts(body: CompletionBody, served: Served) -> list[tuple[int, ...]]:
    """Token ids of every prompt of a completion request."""
    given: Any = body.prompt
    many = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    prompts = []
    for prompt in many:
        if isinstance(prompt, str):
            prompts.append(served.texts.encode(prompt, body.add_special_tokens))
        else:
            check_ids(prompt, served, "prompt")
            prompts.append(tuple(prompt))
    return prompts


def chat_prompt(
    messages: Sequence[Message],
    served: Served,
    *,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, str]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The text of a conversation through the target's chat template. Raises ApiError 400 when the template refuses."""
    extra = dict(template_kwargs or {})
    own = {"messages", *inspect.signature(served.tokenizer.apply_chat_template).parameters} - {"kwargs"}
    if taken := sorted(own & extra.keys()):
        raise bad_request(f"{_KWARGS}.{taken[0]}: the server sets this; give variables of the template's own", _KWARGS)
    if tools and not served.prompt_format.mentions("tools"):
        raise bad_request('tools: the target\'s chat template has none; leave them out, or give tool_choice "none"', "tools")
    try:
        return served.prompt_format.text(
            [m.as_dict() for m in messages],
            tools,
            generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            documents=documents or None,
            **extra,
        )
    except TemplateError as error:
        raise bad_request(f"the chat template cannot render these messages: {error.reason}", "messages") from error


def chat_prompts(body: ChatBody, served: Served) -> list[tuple[int, ...]]:
    """Token ids of a chat request's prompt, as a list of one."""
    kwargs = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    text = chat_prompt(
        body.messages,
        served,
        tools=body.tools if body.tool_choice != "none" else None,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=kwargs,
    )
    return [served.texts.encode(text, body.add_special_tokens)]


def truncated(prompt: tuple[int, ...], body: SamplingBody, max_length: int, max_tokens: int | None) -> tuple[int, ...]:
    """The tokens of a prompt that `truncate_prompt_tokens` leaves: the last ones, or with `truncation_side` "right" the
    first. -1 leaves as many as the context holds beside the answer (`max_tokens`, at least one token)."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep == -1:
        keep = max_length - (max_tokens or 1)
        if keep < 1:
            return prompt  # no prompt goes with so many tokens, which the check of max_tokens says
    return prompt[:keep] if body.truncation_side == "right" else prompt[-keep:]


def sampling_params(
    body: SamplingBody,
    served: Served,
    prompt: Sequence[int],
    choice: int,
    max_tokens: int | None,
    logprobs: int | None,
    constraint: GrammarConstraint | None = None,
) -> SamplingParams:
    """Parameters of choice `choice` (0 to n-1) of one prompt. Choices of one request get seeds in a row.

    `max_tokens` None: all the room that is left. `constraint` is the request's; each choice gets a copy. Raises ApiError
    400.
    """
    info = served.engine.info
    room = info.max_length - len(prompt)
    if not prompt:
        raise bad_request("the prompt is empty; give at least one token", "prompt")
    if room < 1:
        raise bad_request(
            f"This model's maximum context length is {info.max_length} tokens. However, your request has {len(prompt)} "
            "input tokens. Please reduce the length of the input.",
            "input_tokens",
        )
    if max_tokens is not None and max_tokens > room:
        raise bad_request(
            f"'max_tokens' or 'max_completion_tokens' is too large: {max_tokens}. This model's maximum context length "
            f"is {info.max_length} tokens and your request has {len(prompt)} input tokens.",
            "max_tokens" if body.max_tokens == max_tokens else "max_completion_tokens",
        )
    limit = room if max_tokens is None else max_tokens
    if body.min_tokens > limit:
        raise bad_request(f"min_tokens is {body.min_tokens}; it must not exceed max_tokens={limit}", "min_tokens")
    check_ids(body.stop_token_ids, served, "stop_token_ids")
    check_ids(body.allowed_token_ids or (), served, "allowed_token_ids")
    given = {**served.defaults, **{name: value for name in _PLAIN if (value := getattr(body, name)) is not None}}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    given["top_k"] = min(given.get("top_k", 0), info.vocab_size)
    if 0 < given.get("temperature", 1) < MIN_TEMPERATURE:
        given["temperature"] = MIN_TEMPERATURE
    if body.seed is not None:
        given["seed"] = (body.seed + choice) % 2**63
    try:
        return SamplingParams(
            max_tokens=limit,
            logit_bias=_logit_bias(body.logit_bias, served),
            allowed_token_ids=tuple(body.allowed_token_ids) if body.allowed_token_ids else None,
            bad_token_ids=served.texts.spellings(body.bad_words),
            stop=tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            min_tokens=body.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs(body),
            include_stop_str_in_output=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            draft=body.draft,
            constraint=constraint.copy() if constraint is not None else None,
            **given,
        )
    except DataError as error:
        raise bad_request(str(error)) from error


def prompt_logprobs(body: SamplingBody) -> int | None:
    """How many of the likeliest tokens are asked for beside each token of the prompt; None: nothing is."""
    echoed = body.logprobs if isinstance(body, CompletionBody) and body.echo else None
    asked = [top for top in (body.prompt_logprobs, echoed) if top is not None]
    return max(asked, default=None)


def _logit_bias(given: dict[str, float] | None, served: Served) -> dict[int, float] | None:
    if not given:
        return None
    try:
        bias = {int(key): value for key, value in given.items()}
    except ValueError:
        raise bad_request("logit_bias: keys must be token ids written as integers", "logit_bias") from None
    check_ids(bias, served, "logit_bias")
    return bias


def check_ids(ids: Any, served: Served, name: str) -> None:
    """Raises ApiError 400 when an id is not in the vocabulary."""
    size = served.engine.info.vocab_size
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise bad_request(f"{name}: token id {wrong} is out of vocabulary; allowed are 0 to {size - 1}", name)

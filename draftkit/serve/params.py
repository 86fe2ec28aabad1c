"""From a request body to prompts and the engine's sampling parameters; everything that can be wrong is a 400
here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import DataError
from draftkit.serve import deepseek_v4
from draftkit.serve.limits import MAX_COUNTED, check_fits, too_long
from draftkit.serve.messages import Message
from draftkit.serve.plain_text import PlainText, check_roles
from draftkit.serve.problem import ApiError, bad_request, shorten
from draftkit.serve.protocol import ChatBody, CompletionBody, SamplingBody
from draftkit.serve.worker import Served
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
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
        raise ApiError(
            404, f"The model `{shorten(name)}` does not exist; this server has `{served.name}`.", "model"
        )


def completion_prompts(body: CompletionBody, served: Served) -> list[tuple[int, ...]]:
    """Token ids of every prompt of a completion request. Raises ApiError 400 for one that cannot fit."""
    given: Any = body.prompt
    many = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    prompts = []
    for prompt in many:
        if isinstance(prompt, str):
            check_fits(served.texts, [prompt], _most_tokens(body, served))
            prompts.append(served.texts.encode(prompt, body.add_special_tokens))
        else:
            check_ids(prompt, served, "prompt")
            prompts.append(tuple(prompt))
    return prompts


def _most_tokens(body: SamplingBody, served: Served) -> int:
    """Tokens beyond which a text is not tokenised to its end."""
    longest: int = served.engine.info.max_length
    return longest if body.truncate_prompt_tokens is None else max(longest, MAX_COUNTED)


def chat_prompt(
    messages: Sequence[Message],
    served: Served,
    *,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, str]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    add_special_tokens: bool = False,
    most_tokens: int,
) -> tuple[int, ...]:
    """Token ids of a conversation through the target's chat template. Raises ApiError 400 when the template
    refuses, or when there surely are more than `most_tokens`."""
    extra = dict(template_kwargs or {})
    shown = served.prompt_format
    if isinstance(shown, DeepseekFormat):
        if documents or not (add_generation_prompt or continue_final_message):
            raise bad_request(
                "DeepSeek-V4's encoder has no documents and always begins an answer; leave documents and "
                "add_generation_prompt out"
            )
        said = [m.as_dict() for m in messages]
        if continue_final_message:
            said[-1] = deepseek_v4.begun(said[-1])
        mode = deepseek_v4.format_for(shown, extra)
        return deepseek_v4.encoded(mode, said, tools, served.texts, most_tokens)
    if not served.tokenizer.chat_template:
        raise bad_request(
            "messages: the target has no chat template, it is no chat model; use /v1/completions", "messages"
        )
    own = {"self", "messages", *inspect.signature(served.tokenizer.apply_chat_template).parameters} - {
        "kwargs"
    }
    if taken := sorted(own & extra.keys()):
        raise bad_request(
            f"{_KWARGS}.{taken[0]}: the server sets this; give variables of the template's own", _KWARGS
        )
    if tools and not shown.mentions("tools"):
        raise bad_request(
            'tools: the target\'s chat template has none; leave them out, or give tool_choice "none"', "tools"
        )
    check_roles([m.role for m in messages], str(served.tokenizer.chat_template))
    plain = PlainText(served.texts)
    mark = (lambda value: value) if served.honour_special_tokens else plain.mark
    try:
        text = shown.text(
            [mark(m.as_dict()) for m in messages],
            mark(tools),
            generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            documents=mark(documents) or None,
            **mark(extra),
        )
    except TemplateError as error:
        why = shorten(plain.unmarked(error.reason), 1000)
        raise bad_request(f"the chat template cannot render these messages: {why}", "messages") from error
    check_fits(served.texts, [text], most_tokens)
    return plain.encode(text, add_special_tokens)


def template_switches(body: ChatBody) -> dict[str, Any]:
    """The template's variables that a request gives."""
    kwargs = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return kwargs


def chat_prompts(body: ChatBody, served: Served) -> list[tuple[int, ...]]:
    """Token ids of a chat request's prompt, as a list of one."""
    kwargs, tools = template_switches(body), body.tools if body.tool_choice != "none" else None
    if body.form is not None and isinstance(served.prompt_format, DeepseekFormat):
        kwargs, tools = deepseek_v4.for_form(body.forced_calls, kwargs, tools)
    prompt = chat_prompt(
        body.messages,
        served,
        tools=tools,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=kwargs,
        add_special_tokens=body.add_special_tokens,
        most_tokens=_most_tokens(body, served),
    )
    return [prompt]


def truncated(
    prompt: tuple[int, ...], body: SamplingBody, max_length: int, max_tokens: int | None
) -> tuple[int, ...]:
    """The tokens of a prompt that `truncate_prompt_tokens` leaves: the last ones, or with `truncation_side`
    "right" the first. -1 leaves as many as the context holds beside the answer (`max_tokens`, at least one
    token)."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep == -1:
        keep = max_length - (max_tokens or 1)
        if keep < 1:
            return prompt  # no prompt goes with so many tokens, which the check of max_tokens says
    return prompt[:keep] if body.truncation_side == "right" else prompt[-keep:]


def answer_length(body: SamplingBody, served: Served, prompt: Sequence[int], max_tokens: int | None) -> int:
    """Tokens that an answer to this prompt may have; `max_tokens` None: all the room that is left. Raises
    ApiError 400."""
    info = served.engine.info
    room: int = info.max_length - len(prompt)
    if not prompt:
        raise bad_request("the prompt is empty; give at least one token", "prompt")
    if room < 1:
        raise too_long(info.max_length, len(prompt))
    if max_tokens is not None and max_tokens > room:
        param = "max_tokens" if body.max_tokens == max_tokens else "max_completion_tokens"
        raise bad_request(
            f"{param} is too large: {max_tokens}. This model's maximum context length is {info.max_length} "
            f"tokens and your request has {len(prompt)} input tokens.",
            param,
        )
    limit = room if max_tokens is None else max_tokens
    if body.min_tokens > limit:
        raise bad_request(
            f"min_tokens is {body.min_tokens}; it must not exceed max_tokens={limit}", "min_tokens"
        )
    return limit


def sampling_params(body: SamplingBody, served: Served, logprobs: int | None) -> SamplingParams:
    """What all answers of a request have in common: no length and no constraint, which
    `SamplingParams.of_answer` adds. Raises ApiError 400."""
    check_ids(body.stop_token_ids, served, "stop_token_ids")
    check_ids(body.allowed_token_ids or (), served, "allowed_token_ids")
    given = {
        **served.defaults,
        **{name: value for name in _PLAIN if (value := getattr(body, name)) is not None},
    }
    if given.get("top_k") == -1:
        given["top_k"] = 0
    given["top_k"] = min(given.get("top_k", 0), served.engine.info.vocab_size)
    if 0 < given.get("temperature", 1) < MIN_TEMPERATURE:
        given["temperature"] = MIN_TEMPERATURE
    if body.seed is not None:
        given["seed"] = body.seed % 2**63
    try:
        return SamplingParams(
            logit_bias=_logit_bias(body.logit_bias, served),
            allowed_token_ids=tuple(body.allowed_token_ids) if body.allowed_token_ids else None,
            bad_token_ids=served.texts.spellings(body.bad_words),
            stop=tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            max_tokens=None,
            min_tokens=body.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs(body),
            include_stop_str_in_output=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            draft=body.draft,
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
    if ids and not 0 <= min(ids) <= max(ids) < size:
        wrong = next(i for i in ids if not 0 <= i < size)
        raise bad_request(f"{name}: token id {wrong} is out of vocabulary; allowed are 0 to {size - 1}", name)

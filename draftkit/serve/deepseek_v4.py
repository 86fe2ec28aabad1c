"""Chat requests of a DeepSeek-V4 target: prompts by DeepSeek's encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftkit.errors import ConfigError
from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.formats import ForcedCalls
from draftkit.serve.limits import check_fits
from draftkit.serve.problem import bad_request
from draftkit.target.deepseek_v4_messages import reasoning_of
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
from draftkit.target.prompt_format import TemplateError


def format_for(shown: DeepseekFormat, switches: dict[str, Any]) -> DeepseekFormat:
    """The format with a request's own switches. Raises ApiError 400."""
    try:
        return shown.with_switches(switches)
    except ConfigError as error:
        raise bad_request(str(error), "chat_template_kwargs") from error


def begun(message: dict[str, Any]) -> dict[str, Any]:
    """The last message of a request with `continue_final_message`, as the encoder has it. Raises ApiError
    400."""
    lacking = {
        "is not the assistant's": message["role"] != "assistant",
        "has tool_calls, after which an answer ends": bool(message.get("tool_calls")),
        "has no content to go on with": not (message.get("content") or reasoning_of(message)),
    }
    if told := next((what for what, is_so in lacking.items() if is_so), None):
        raise bad_request(f"continue_final_message: the last message {told}", "messages")
    return message | {"prefix": True}


def for_form(
    forced: ForcedCalls | None, switches: dict[str, Any], tools: list[dict[str, Any]] | None
) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """Switches and tools of a request whose answer has a form: it is written without thinking, unless the
    request asks for that. A call that is demanded never is, as at DeepSeek, and a function that is named is
    shown alone. Raises ApiError 400 when such a call is to be thought about."""
    effort, names = switches.get("reasoning_effort", "none"), ("thinking", "enable_thinking")
    thinks = effort != "none" or any(switches.get(name) for name in names)
    if forced is None:
        return (switches if thinks else switches | {"thinking": False}), tools
    if thinks:
        raise bad_request(
            "tool_choice: DeepSeek-V4 makes a call that is demanded without thinking; leave reasoning_effort "
            "and thinking out, or give 'auto'",
            "tool_choice",
        )
    return switches | {"thinking": False}, [{"type": "function", "function": f} for f in forced.functions]


def encoded(
    shown: DeepseekFormat,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    texts: TokenTexts,
    most_tokens: int,
) -> tuple[int, ...]:
    """Token ids of a conversation. Raises ApiError 400 when the encoder refuses it, or when there surely are
    more than `most_tokens`."""
    try:
        check_fits(texts, [shown.text(messages, tools)], most_tokens)
        return shown.prompt(messages, tools)
    except TemplateError as error:
        raise bad_request(
            f"DeepSeek-V4's encoder refuses these messages: {error.reason}", "messages"
        ) from error

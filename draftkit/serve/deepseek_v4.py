"""Chat requests of a DeepSeek-V4 target: prompts by DeepSeek's encoder, answers by its parser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from draftkit.errors import ConfigError
from draftkit.serve.choice import Choice, Delta
from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.limits import check_fits
from draftkit.serve.problem import bad_request
from draftkit.serve.prompt_scores import Echo
from draftkit.serve.reply import ChatReply
from draftkit.target.deepseek_v4_answers import AnswerStream
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
from draftkit.target.prompt_format import TemplateError


def format_for(shown: DeepseekFormat, switches: dict[str, Any]) -> DeepseekFormat:
    """The format with a request's own switches. Raises ApiError 400."""
    try:
        return shown.with_switches(switches)
    except ConfigError as error:
        raise bad_request(str(error), "chat_template_kwargs") from error


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


@dataclass
class DeepseekReply(ChatReply):
    """Bodies of /v1/chat/completions with `reasoning_content` and tool calls."""

    answers: Callable[[], AnswerStream] = field(kw_only=True)
    streams: dict[int, AnswerStream] = field(default_factory=dict)

    def chunk(self, index: int, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """What one step adds; None when there is nothing to show."""
        stream = self.streams.setdefault(index, self.answers())
        found = stream.add_text(delta.text)
        reason = delta.finish_reason
        if reason is not None:
            found += stream.close()
            if reason == "stop" and stream.calls:
                reason = "tool_calls"
        logprobs = self._logprobs(delta.events) if choice.params.logprobs is not None else None
        said = _joined(found)
        if not (said or reason or (logprobs and delta.events)):
            return None
        return {
            "index": index,
            "delta": said,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": delta.stop_reason,
        }

    def whole(self, index: int, choice: Choice, pieces: Sequence[str], echo: Echo) -> dict[str, Any]:
        """A complete answer."""
        stream = self.answers()
        stream.add_text(choice.text)
        message = stream.finish().message()
        called = choice.finish_reason == "stop" and message.get("tool_calls")
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.events) if choice.params.logprobs is not None else None,
            "finish_reason": "tool_calls" if called else choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


def _joined(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One delta of several: texts end to end, calls in their order."""
    said: dict[str, Any] = {}
    for delta in deltas:
        for name in ("reasoning_content", "content"):
            if delta.get(name):
                said[name] = said.get(name, "") + delta[name]
        said.setdefault("tool_calls", []).extend(delta.get("tool_calls", ()))
    return {name: value for name, value in said.items() if value}

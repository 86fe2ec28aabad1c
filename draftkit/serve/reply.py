"""Response bodies: the same answer as OpenAI's completion or chat completion, whole or in chunks.

Plain dicts: a chunk is built per round of every request, and nothing here needs checking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from draftkit.engine.outputs import RequestStats, TokenEvent
from draftkit.serve.choice import Choice, Delta, spec_stats, timings
from draftkit.serve.detokenize import TokenTexts, finite, token_name
from draftkit.serve.prompt_scores import Echo
from draftkit.serve.tools import ToolCalls


@dataclass
class CompletionReply:
    """Bodies of /v1/completions."""

    texts: TokenTexts
    as_ids: bool  # tokens are named "token_id:N"
    whole_object = chunk_object = "text_completion"
    prefix = "cmpl-"
    offsets: dict[int, int] = field(default_factory=dict)

    def opening(self, index: int, echo: Echo, prompt: Sequence[int] | None) -> dict[str, Any] | None:
        """The first chunk of an answer: the prompt, as text where it is to be echoed and as ids where they
        are given."""
        self.offsets[index] = len(echo.text)
        logprobs = self._logprobs(echo.events, echo.pieces, 0) if echo.events else None
        opening = {"index": index, "text": echo.text, "logprobs": logprobs, "finish_reason": None}
        if prompt is not None:
            return opening | {"prompt_token_ids": list(prompt), "token_ids": []}
        return opening if echo.text or echo.events else None

    def chunk(self, index: int, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """What one step adds; None when there is nothing to show."""
        logprobs = None
        if choice.params.logprobs is not None:
            logprobs = self._logprobs(delta.events, delta.pieces, self.offsets.get(index, 0))
        self.offsets[index] = self.offsets.get(index, 0) + sum(map(len, delta.pieces))
        if not (delta.text or delta.finish_reason or (logprobs and delta.events)):
            return None
        return {
            "index": index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def whole(self, index: int, choice: Choice, pieces: Sequence[str], echo: Echo) -> dict[str, Any]:
        """A complete answer."""
        logprobs = None
        if choice.params.logprobs is not None:
            offset = 0 if echo.events else len(echo.text)
            logprobs = self._logprobs([*echo.events, *choice.events], [*echo.pieces, *pieces], offset)
        return {
            "index": index,
            "text": echo.text + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, events: Sequence[TokenEvent], pieces: Sequence[str], offset: int) -> dict[str, Any]:
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece)
        return {
            "tokens": [token_name(self.texts, e.token_id, self.as_ids) for e in events],
            "token_logprobs": [finite(e.logprob) for e in events],
            "top_logprobs": [None if e.logprob is None else self._top(e) for e in events],
            "text_offset": offsets,
        }

    def _top(self, event: TokenEvent) -> dict[str, float | None]:
        """The likeliest tokens and the one that was drawn, which may be another: OpenAI gives up to logprobs
        + 1."""
        drawn = {token_name(self.texts, event.token_id, self.as_ids): finite(event.logprob)}
        likely = {token_name(self.texts, t, self.as_ids): finite(p) for t, p in event.top_logprobs}
        return drawn | likely | drawn  # it comes first, and no other token of the same text takes its place


@dataclass
class ChatReply:
    """Bodies of /v1/chat/completions. `tools`: parse tool calls out of the text; `one_call`: give the first
    one only; `named`: the request named the function, and then an answer that is a call has stopped like any
    other, as at OpenAI and vLLM."""

    texts: TokenTexts
    as_ids: bool
    tools: bool = False
    one_call: bool = False
    named: bool = False
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl-"
    parsers: dict[int, ToolCalls] = field(default_factory=dict)

    def opening(self, index: int, echo: Echo, prompt: Sequence[int] | None) -> dict[str, Any] | None:
        """The first chunk of an answer: who speaks. The prompt's ids belong to the chunk, not to the
        choice."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def chunk(self, index: int, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """What one step adds; None when there is nothing to show."""
        content, reason, given = delta.text, delta.finish_reason, 0
        calls: list[dict[str, Any]] = []
        if self.tools:
            parser = self.parsers.setdefault(index, ToolCalls(self.one_call))
            given = len(parser.calls)
            content, calls = parser.add(delta.text)
            if reason is not None:
                rest, last = parser.finish()
                content, calls = content + rest, calls + last
                if reason == "stop" and parser.calls and not self.named:
                    reason = "tool_calls"
            if parser.calls and not content.strip():  # what templates write between calls
                content = ""
        logprobs = self._logprobs(delta.events) if choice.params.logprobs is not None else None
        if not (content or calls or reason or (logprobs and delta.events)):
            return None
        said: dict[str, Any] = {"content": content} if content or not calls else {}
        if calls:
            said["tool_calls"] = [{"index": given + i, **call} for i, call in enumerate(calls)]
        return {
            "index": index,
            "delta": said,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": delta.stop_reason,
        }

    def whole(self, index: int, choice: Choice, pieces: Sequence[str], echo: Echo) -> dict[str, Any]:
        """A complete answer."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        reason = choice.finish_reason
        if self.tools:
            parser = ToolCalls(self.one_call)
            content, _ = parser.add(choice.text)
            content += parser.finish()[0]
            if parser.calls:
                message = {
                    "role": "assistant",
                    "content": content.strip() or None,
                    "tool_calls": parser.calls,
                }
                reason = "tool_calls" if reason == "stop" and not self.named else reason
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.events) if choice.params.logprobs is not None else None,
            "finish_reason": reason,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._named(e.token_id, e.logprob),
                    "top_logprobs": [self._named(token, logprob) for token, logprob in e.top_logprobs],
                }
                for e in events
            ]
        }

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self.texts.token_bytes(token)
        return {
            "token": token_name(self.texts, token, self.as_ids),
            "logprob": finite(logprob),
            "bytes": list(raw),
        }


def origins(texts: TokenTexts, delta: Delta) -> dict[str, Any]:
    """Where each token of a step came from: [text, 'accepted' | 'target'], and the drafts that were thrown
    away."""
    return {
        "tokens": [[piece, e.origin] for piece, e in zip(delta.pieces, delta.events, strict=True)],
        "rejected": [token_name(texts, token) for token in delta.rejected],
    }


def usage(choices: Sequence[Choice], prompt_tokens: int, n: int) -> dict[str, Any]:
    """OpenAI's `usage` over all answers of a request, `n` for each prompt. Each prompt counts once, and so
    does what was known of it: by its first answer, since the others find what that one has read."""
    made = sum(len(choice.events) for choice in choices)
    firsts = [
        (choice.stats.cached_tokens, choice.prompt_tokens)
        for choice in choices[::n]
        if choice.stats is not None
    ]
    cached = sum(min(found, length) for found, length in firsts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def speculation(choices: Sequence[Choice], gamma: int) -> dict[str, Any]:
    """The `metrics` of a response: statistics of speculation summed over its answers, times of the slowest
    one."""
    known = [c.stats for c in choices if c.stats is not None]
    if not known:
        return {"speculative_decoding": None}
    positions = [
        sum(column) for column in zip(*_padded([s.accepted_per_position for s in known]), strict=True)
    ]
    total = RequestStats(
        prompt_tokens=sum(s.prompt_tokens for s in known),
        cached_tokens=sum(s.cached_tokens for s in known),
        output_tokens=sum(s.output_tokens for s in known),
        rounds=sum(s.rounds for s in known),
        drafted=sum(s.drafted for s in known),
        verified=sum(s.verified for s in known),
        accepted=sum(s.accepted for s in known),
        accepted_per_position=tuple(positions),
        queue_seconds=max(s.queue_seconds for s in known),
        prefill_seconds=max(s.prefill_seconds for s in known),
        decode_seconds=max(s.decode_seconds for s in known),
    )
    return {"speculative_decoding": spec_stats(total, gamma), **timings(total)}


def _padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    width = max(map(len, rows), default=0)
    return [[*row, *[0] * (width - len(row))] for row in rows]

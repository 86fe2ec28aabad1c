"""Response bodies: the same answer as OpenAI's completion or chat completion, whole or in chunks.

Plain dicts: a chunk is built per round of every request, and nothing here needs checking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from draftkit.engine.request import RequestStats, TokenEvent
from draftkit.serve.choice import Choice, Delta, spec_stats, timings
from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.tools import ToolCalls

_FLOOR = -9999.0  # JSON has no -inf; vLLM's stand-in


@dataclass
class CompletionReply:
    """Bodies of /v1/completions."""

    texts: TokenTexts
    as_ids: bool  # tokens are named "token_id:N"
    whole_object = chunk_object = "text_completion"
    prefix = "cmpl-"
    offsets: dict[int, int] = field(default_factory=dict)

    def opening(self, index: int, echo: str, prompt: Sequence[int] | None) -> dict[str, Any] | None:
        """The first chunk of an answer: the prompt, as text where it is to be echoed and as ids where they are given."""
        self.offsets[index] = len(echo)
        opening = {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
        if prompt is not None:
            return opening | {"prompt_token_ids": list(prompt), "token_ids": []}
        return opening if echo else None

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

    def whole(self, index: int, choice: Choice, pieces: Sequence[str], echo: str) -> dict[str, Any]:
        """A complete answer."""
        logprobs = None
        if choice.params.logprobs is not None:
            logprobs = self._logprobs(choice.events, pieces, len(echo))
        return {
            "index": index,
            "text": echo + choice.text,
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
            "token_logprobs": [_finite(e.logprob) for e in events],
            "top_logprobs": [self._top(e) for e in events],
            "text_offset": offsets,
        }

    def _top(self, event: TokenEvent) -> dict[str, float | None]:
        """The likeliest tokens and the one that was drawn, which may be another: OpenAI gives up to logprobs + 1."""
        drawn = {token_name(self.texts, event.token_id, self.as_ids): _finite(event.logprob)}
        likely = {token_name(self.texts, t, self.as_ids): _finite(p) for t, p in event.top_logprobs}
        return drawn | likely | drawn  # it comes first, and no other token of the same text takes its place


@dataclass
class ChatReply:
    """Bodies of /v1/chat/completions. `tools`: parse tool calls out of the text; `one_call`: give the first one only."""

    texts: TokenTexts
    as_ids: bool
    tools: bool = False
    one_call: bool = False
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl-"
    parsers: dict[int, ToolCalls] = field(default_factory=dict)

    def opening(self, index: int, echo: str, prompt: Sequence[int] | None) -> dict[str, Any] | None:
        """The first chunk of an answer: who speaks. The prompt's ids belong to the chunk, not to the choice."""
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
                if reason == "stop" and parser.calls:
                    reason = "tool_calls"
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

    def whole(self, index: int, choice: Choice, pieces: Sequence[str], echo: str) -> dict[str, Any]:
        """A complete answer."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        reason = choice.finish_reason
        if self.tools:
            parser = ToolCalls(self.one_call)
            content, _ = parser.add(choice.text)
            content += parser.finish()[0]
            if parser.calls:
                message = {"role": "assistant", "content": content.strip() or None, "tool_calls": parser.calls}
                reason = "tool_calls" if reason == "stop" else reason
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
        return {"token": token_name(self.texts, token, self.as_ids), "logprob": _finite(logprob), "bytes": list(raw)}


def token_name(texts: TokenTexts, token: int, as_id: bool = False) -> str:
    """A token for people to read; parts of characters show as U+FFFD."""
    return f"token_id:{token}" if as_id else texts.token_bytes(token).decode("utf-8", errors="replace")


def origins(texts: TokenTexts, delta: Delta) -> dict[str, Any]:
    """Where each token of a step came from: [text, 'accepted' | 'target'], and the drafts that were thrown away."""
    return {
        "tokens": [[piece, e.origin] for piece, e in zip(delta.pieces, delta.events, strict=True)],
        "rejected": [token_name(texts, token) for token in delta.rejected],
    }


def usage(choices: Iterable[Choice], prompt_tokens: int) -> dict[str, Any]:
    """OpenAI's `usage` over all answers of a request; `prompt_tokens` counts each prompt once."""
    made = 0
    cached = 0
    for choice in choices:
        made += len(choice.events)
        if choice.stats is not None:
            cached = max(cached, choice.stats.cached_tokens)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt_tokens)},
    }


def speculation(choices: Sequence[Choice], gamma: int) -> dict[str, Any]:
    """The `metrics` of a response: statistics of speculation summed over its answers, times of the slowest one."""
    known = [c.stats for c in choices if c.stats is not None]
    if not known:
        return {"speculative_decoding": None}
    positions = [sum(column) for column in zip(*_padded([s.accepted_per_position for s in known]), strict=True)]
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


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _FLOOR) if not math.isnan(logprob) else _FLOOR

"""Response bodies: the same answer as OpenAI's completion or chat completion, whole or in chunks.

Plain dicts: a chunk is built per round of every request, and nothing here needs checking.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from draftkit.engine.outputs import RequestStats, TokenEvent
from draftkit.serve.choice import Choice, Delta, spec_stats, timings
from draftkit.serve.detokenize import TokenTexts, finite, token_name
from draftkit.serve.prompt_scores import Echo
from draftkit.target.answer_stream import AnswerDelta, AnswerStream


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
    """Bodies of /v1/chat/completions. `reader` makes what takes an answer apart into reasoning, content
    and calls; without one the text is the content, and without `reasons` reasoning is left out.
    `one_call`: give the first call only; `named`: the request named the function, and then an answer that
    is a call has stopped like any other, as at OpenAI and vLLM."""

    texts: TokenTexts
    as_ids: bool
    reader: Callable[[], AnswerStream] | None = None
    one_call: bool = False
    named: bool = False
    reasons: bool = True
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl-"
    readers: dict[int, AnswerStream] = field(default_factory=dict)
    called: Counter[int] = field(default_factory=Counter)  # calls that were given, by choice

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
        reason, given = delta.finish_reason, self.called[index]
        parts = AnswerDelta(content=delta.text)
        if self.reader is not None:
            if index not in self.readers:
                self.readers[index] = self.reader()
            reader = self.readers[index]
            parts = reader.add(delta.text)
            parts = self._shown(parts + (reader.finish() if reason is not None else AnswerDelta()))
        calls = self._own(parts.tool_calls, given)
        self.called[index] += len(calls)
        logprobs = self._logprobs(delta.events) if choice.params.logprobs is not None else None
        if not (parts.content or parts.reasoning or calls or reason or (logprobs and delta.events)):
            return None
        said: dict[str, Any] = {"reasoning_content": parts.reasoning} if parts.reasoning else {}
        if parts.content or not (calls or said):
            said["content"] = parts.content
        if calls:
            said["tool_calls"] = [{"index": given + i, **call} for i, call in enumerate(calls)]
        if reason == "stop" and self.called[index] and not self.named:
            reason = "tool_calls"
        return {
            "index": index,
            "delta": said,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": delta.stop_reason,
        }

    def whole(self, index: int, choice: Choice, pieces: Sequence[str], echo: Echo) -> dict[str, Any]:
        """A complete answer."""
        parts = AnswerDelta(content=choice.text)
        if self.reader is not None:
            reader = self.reader()
            parts = self._shown(reader.add(choice.text) + reader.finish())
        calls, reason = self._own(parts.tool_calls, 0), choice.finish_reason
        message: dict[str, Any] = {"role": "assistant", "content": parts.content}
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        if calls:
            message |= {"content": parts.content or None, "tool_calls": calls}
            reason = "tool_calls" if reason == "stop" and not self.named else reason
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.events) if choice.params.logprobs is not None else None,
            "finish_reason": reason,
            "stop_reason": choice.stop_reason,
        }

    def _shown(self, parts: AnswerDelta) -> AnswerDelta:
        return parts if self.reasons else replace(parts, reasoning="")

    def _own(self, calls: Sequence[dict[str, Any]], given: int) -> list[dict[str, Any]]:
        """Calls under names that no other answer has; the first one only, where that is asked for."""
        most = max(1 - given, 0) if self.one_call else len(calls)
        return [{**call, "id": f"call_{uuid.uuid4().hex[:24]}"} for call in calls[:most]]

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

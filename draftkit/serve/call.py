"""One call that makes text, and the bytes of its answer: a whole body, or the chunks of a stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from draftkit.engine.outputs import PromptToken
from draftkit.serve import params as from_body
from draftkit.serve.choice import Choice, Delta
from draftkit.serve.prompt_scores import Echo, as_vllm, echo_of
from draftkit.serve.protocol import CompletionBody, SamplingBody
from draftkit.serve.reply import ChatReply, CompletionReply, origins, speculation, usage
from draftkit.serve.stream import dump, joined
from draftkit.serve.wire import Wire
from draftkit.serve.worker import Served


@dataclass
class Call:
    """One HTTP request that makes text: `n` choices per prompt, in order."""

    request_id: str
    created: int
    served: Served
    body: SamplingBody
    reply: CompletionReply | ChatReply
    prompts: list[tuple[int, ...]]
    choices: list[Choice]
    wire: Wire

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once."""
        return sum(map(len, self.prompts))

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of choice `index`."""
        return self.prompts[index // self.body.n]

    def scores(self, index: int) -> tuple[PromptToken, ...] | None:
        """What is known of the prompt of choice `index`, once the first choice of that prompt has begun."""
        return self.choices[index - index % self.body.n].prompt

    def prompt_ids(self, kind: type[ChatReply] | type[CompletionReply], index: int = 0) -> list[int] | None:
        """The prompt's ids where they are asked for and belong, as in vLLM: a chat has one prompt, and they
        stand beside its choices; completions have one for each choice, and they stand in it."""
        asked = self.body.return_token_ids and isinstance(self.reply, kind)
        return list(self.prompt_of(index)) if asked else None

    def echo(self, index: int) -> Echo:
        """The prompt where the request wants it back."""
        if not (isinstance(self.body, CompletionBody) and self.body.echo):
            return Echo()
        scores, special = self.scores(index), self.body.skip_special_tokens
        return echo_of(self.served.texts, self.prompt_of(index), special, scores, self.body.logprobs)

    @property
    def running_usage(self) -> dict[str, Any]:
        """`usage` so far, for each chunk of a stream that asks for it; as in vLLM, `include_usage` must be
        asked for too."""
        options = self.body.stream_options
        asked = options is not None and options.include_usage and options.continuous_usage_stats
        return {"usage": usage(self.choices, self.prompt_tokens, self.body.n)} if asked else {}

    @property
    def echoes_scores(self) -> bool:
        """The echo can only be told when the prompt has been read."""
        return isinstance(self.body, CompletionBody) and self.body.echo and self.body.logprobs is not None

    def prompt_logprobs(
        self, kind: type[ChatReply] | type[CompletionReply], index: int = 0
    ) -> dict[str, Any]:
        """vLLM's field where it is asked for and belongs, see `prompt_ids`."""
        scores = self.scores(index)
        if self.body.prompt_logprobs is None or scores is None or not isinstance(self.reply, kind):
            return {}
        top = [replace(s, top_logprobs=s.top_logprobs[: self.body.prompt_logprobs]) for s in scores]
        return {"prompt_logprobs": as_vllm(self.served.texts, top, self.body.return_tokens_as_token_ids)}

    def envelope(self, kind: str, choices: list[dict[str, Any]], first: bool = False) -> dict[str, Any]:
        """The fields that all bodies begin with. `first`: nothing of these choices was sent before."""
        made = {
            "id": self.reply.prefix + self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
        }
        if first and (prompt := self.prompt_ids(ChatReply)) is not None:
            made["prompt_token_ids"] = prompt
        return made


def values(call: Call) -> int:
    """About how many values a whole response has."""
    told = sum(len(c.events) * (1 + (c.params.logprobs or 0)) for c in call.choices)
    scored = from_body.prompt_logprobs(call.body)
    return told if scored is None else told + call.prompt_tokens * call.body.n * (1 + scored)


def whole_body(call: Call, pieces: list[list[str]]) -> bytes:
    """The body, written choice by choice: to write JSON keeps all threads waiting, and so does clearing up
    after it."""
    told: list[bytes] = []
    for index, choice in enumerate(call.choices):
        if index % call.body.n == 0:  # the prompt's, for all its choices
            scores = dump(call.prompt_logprobs(CompletionReply, index))
        answer = call.reply.whole(index, choice, pieces[index], call.echo(index))
        if call.body.return_token_ids:
            answer["token_ids"] = [e.token_id for e in choice.events]
        if (prompt := call.prompt_ids(CompletionReply, index)) is not None:
            answer["prompt_token_ids"] = prompt
        told.append(joined(dump(answer), scores))
    whole = call.envelope(call.reply.whole_object, [], first=True)
    whole["usage"] = usage(call.choices, call.prompt_tokens, call.body.n)
    if call.body.return_spec_stats:
        whole["metrics"] = speculation(call.choices, call.served.engine.info.gamma)
    body = joined(dump(whole), dump(call.prompt_logprobs(ChatReply)))
    return call.wire.whole(body.replace(b'"choices":[]', b'"choices":[' + b",".join(told) + b"]", 1))


def opening_chunk(call: Call, index: int, unopened: set[int]) -> bytes:
    """The first chunk of a choice, once."""
    if index not in unopened:
        return b""
    unopened.discard(index)
    opening = call.reply.opening(index, call.echo(index), call.prompt_ids(CompletionReply, index))
    if opening is None:
        return b""
    chunk = call.envelope(call.reply.chunk_object, [opening], first=True)
    return call.wire.chunk(chunk | call.running_usage)


def chunk_of(call: Call, index: int, delta: Delta) -> bytes:
    """What a delta says, as a client gets it; empty where nothing of it is shown."""
    body = call.body
    shown = call.reply.chunk(index, call.choices[index], delta)
    if shown is None:
        if not (delta.events and (body.return_token_origins or body.return_token_ids)):
            return b""
        empty = Delta("", (), (), (), None, None)
        shown = call.reply.chunk(index, call.choices[index], empty) or {"index": index, "finish_reason": None}
        shown["delta" if isinstance(call.reply, ChatReply) else "text"] = (
            {} if isinstance(call.reply, ChatReply) else ""
        )
    if body.return_token_ids:
        shown["token_ids"] = [e.token_id for e in delta.events]
    chunk = call.envelope(call.reply.chunk_object, [shown])
    if body.return_token_origins:
        shown["origins"] = origins(call.served.texts, delta)
        chunk["metrics"] = speculation([call.choices[index]], call.served.engine.info.gamma)
    return call.wire.chunk(chunk | call.running_usage)


def last_chunk(call: Call) -> bytes:
    """Usage and counts after the last choice's end, where they are asked for."""
    options = call.body.stream_options
    wants_usage = options is not None and options.include_usage
    if not (wants_usage or call.body.return_spec_stats):
        return b""
    last = call.envelope(call.reply.chunk_object, [])
    if wants_usage:
        last["usage"] = usage(call.choices, call.prompt_tokens, call.body.n)
    if call.body.return_spec_stats:
        last["metrics"] = speculation(call.choices, call.served.engine.info.gamma)
    return call.wire.chunk(last)

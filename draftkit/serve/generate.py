"""The two endpoints that make text: from a request body to an answer, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.responses import Response

from draftkit.serve import params as from_body
from draftkit.serve.choice import Choice, Delta
from draftkit.serve.messages import NamedTool
from draftkit.serve.problem import ApiError, bad_request
from draftkit.serve.prompt_scores import Echo, as_vllm, echo_of
from draftkit.serve.protocol import ChatBody, CompletionBody, SamplingBody
from draftkit.serve.reply import ChatReply, CompletionReply, origins, speculation, usage
from draftkit.serve.settings import ServeSettings
from draftkit.serve.stream import EventStream, dump, event, read_body, unless_client_leaves, unless_long
from draftkit.serve.structured import constraint_of
from draftkit.serve.tools import template_writes_tool_calls
from draftkit.serve.worker import Served, Ticket, Worker


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

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once."""
        return sum(map(len, self.prompts))

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of choice `index`."""
        return self.prompts[index // self.body.n]

    def prompt_ids(self, kind: type[ChatReply] | type[CompletionReply], index: int = 0) -> list[int] | None:
        """The prompt's ids where they are asked for and belong, as in vLLM: a chat has one prompt, and they stand beside
        its choices; completions have one for each choice, and they stand in it."""
        asked = self.body.return_token_ids and isinstance(self.reply, kind)
        return list(self.prompt_of(index)) if asked else None

    def echo(self, index: int) -> Echo:
        """The prompt where the request wants it back."""
        if not (isinstance(self.body, CompletionBody) and self.body.echo):
            return Echo()
        scores, special = self.choices[index].prompt, self.body.skip_special_tokens
        return echo_of(self.served.texts, self.prompt_of(index), special, scores, self.body.logprobs)

    @property
    def running_usage(self) -> dict[str, Any]:
        """`usage` so far, for each chunk of a stream that asks for it; as in vLLM, `include_usage` must be asked for too."""
        options = self.body.stream_options
        asked = options is not None and options.include_usage and options.continuous_usage_stats
        return {"usage": usage(self.choices, self.prompt_tokens, self.body.n)} if asked else {}

    @property
    def echoes_scores(self) -> bool:
        """The echo can only be told when the prompt has been read."""
        return isinstance(self.body, CompletionBody) and self.body.echo and self.body.logprobs is not None

    def prompt_logprobs(self, kind: type[ChatReply] | type[CompletionReply], index: int = 0) -> dict[str, Any]:
        """vLLM's field where it is asked for and belongs, see `prompt_ids`."""
        scores = self.choices[index].prompt
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


async def completions(request: Request, worker: Worker, settings: ServeSettings) -> Response:
    """POST /v1/completions."""
    body = await read_body(request, CompletionBody, settings.max_body_bytes)
    served = worker.ready()
    from_body.check_model(body.model, served)
    prompts = await unless_long(_size(request), from_body.completion_prompts, body, served)
    reply = CompletionReply(served.texts, body.return_tokens_as_token_ids)
    limit = 16 if body.max_tokens is None else max(body.max_tokens, 1)  # one is made, and not shown where none is wanted
    return await _answer(request, worker, settings, served, body, reply, prompts, limit, body.logprobs)


async def chat_completions(request: Request, worker: Worker, settings: ServeSettings) -> Response:
    """POST /v1/chat/completions."""
    body = await read_body(request, ChatBody, settings.max_body_bytes)
    served = worker.ready()
    from_body.check_model(body.model, served)
    prompts = await unless_long(_size(request), from_body.chat_prompts, body, served)
    wants_tools = bool(body.tools) and body.tool_choice != "none"
    parses = template_writes_tool_calls(served.tokenizer)
    if body.forced_calls is not None and not parses:
        raise bad_request("tool_choice: the target's chat template has no form for calls; give 'auto' or 'none'", "tool_choice")
    reply = ChatReply(
        served.texts,
        body.return_tokens_as_token_ids,
        wants_tools and parses,
        one_call=not body.parallel_tool_calls,
        named=isinstance(body.tool_choice, NamedTool),
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = body.top_logprobs if body.logprobs else None
    return await _answer(request, worker, settings, served, body, reply, prompts, limit, logprobs)


def _size(request: Request) -> int:
    """Bytes of the body as declared; a body in chunks of unknown length counts as long."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdigit() else 2**31


async def _answer(
    request: Request,
    worker: Worker,
    settings: ServeSettings,
    served: Served,
    body: SamplingBody,
    reply: CompletionReply | ChatReply,
    prompts: list[tuple[int, ...]],
    limit: int | None,
    logprobs: int | None,
) -> Response:
    if len(prompts) * body.n > settings.max_choices:
        raise bad_request(
            f"{len(prompts)} prompts times n={body.n} is more than the {settings.max_choices} answers that this server "
            "makes per request",
            "n" if body.n > 1 else "prompt",
        )
    # The body's request_id names the request too, as in vLLM; the header goes before it.
    if body.request_id is not None and request.headers.get("x-request-id") != request.state.request_id:
        request.state.request_id = body.request_id
    prompts = [from_body.truncated(p, body, served.engine.info.max_length, limit) for p in prompts]
    constraint = None
    if body.form is not None:  # in a thread: compiling must not hold up everybody else's streams
        constraint = await asyncio.to_thread(constraint_of, body.form, served)
    work = []
    for prompt in prompts:
        # An unset max_tokens of /v1/completions is 16, or less where the context ends sooner.
        room = served.engine.info.max_length - len(prompt)
        unset = isinstance(body, CompletionBody) and body.max_tokens is None
        own = min(limit, room) if limit is not None and unset and room > 0 else limit
        for i in range(body.n):
            work.append((prompt, from_body.sampling_params(body, served, prompt, i, own, logprobs, constraint)))
    choices = [Choice(served.texts, params, len(prompt), only_prompt=body.max_tokens == 0) for prompt, params in work]
    call = Call(request.state.request_id, int(time.time()), served, body, reply, prompts, choices)
    ticket = await unless_client_leaves(request.receive, worker.submit(call.request_id, work, whole=not body.stream))
    if body.stream:
        return EventStream(_stream(call, worker, ticket, request), on_close=lambda: worker.cancel(ticket))
    try:
        whole = await unless_client_leaves(request.receive, _collect(call, worker, ticket))
    finally:
        worker.cancel(ticket)
    return Response(dump(whole), media_type="application/json")


async def _next(worker: Worker, ticket: Ticket, choices: list[Choice]) -> list[tuple[int, Delta]]:
    """At least one delta: waits for the first output and takes the others that are there. Raises ApiError."""
    items = [await ticket.items.get()]
    while not ticket.items.empty():
        items.append(ticket.items.get_nowait())
    deltas = []
    for item in items:
        if isinstance(item, ApiError):
            raise item
        index, output = item
        choice = choices[index]
        if choice.finish_reason is not None:
            continue  # outputs beyond a stop string
        deltas.append((index, choice.add(output)))
        if choice.stopped_by_text:
            worker.finish(ticket, index, "stop", output.stats)
    return deltas


async def _collect(call: Call, worker: Worker, ticket: Ticket) -> dict[str, Any]:
    """The whole response."""
    pieces: list[list[str]] = [[] for _ in call.choices]
    while any(c.finish_reason is None for c in call.choices):
        for index, delta in await _next(worker, ticket, call.choices):
            pieces[index] += delta.pieces
    answers = []
    for index, choice in enumerate(call.choices):
        answer = call.reply.whole(index, choice, pieces[index], call.echo(index))
        if call.body.return_token_ids:
            answer["token_ids"] = [e.token_id for e in choice.events]
        if (prompt := call.prompt_ids(CompletionReply, index)) is not None:
            answer["prompt_token_ids"] = prompt
        answers.append(answer | call.prompt_logprobs(CompletionReply, index))
    whole = call.envelope(call.reply.whole_object, answers, first=True) | call.prompt_logprobs(ChatReply)
    whole["usage"] = usage(call.choices, call.prompt_tokens, call.body.n)
    if call.body.return_spec_stats:
        whole["metrics"] = speculation(call.choices, call.served.engine.info.gamma)
    return whole


async def _stream(call: Call, worker: Worker, ticket: Ticket, request: Request) -> AsyncGenerator[bytes, None]:
    """Server-sent events of a response. An error in the middle is an event, and a word in the log: the status is sent."""
    try:
        unopened = set(range(len(call.choices)))
        if not call.echoes_scores:
            yield b"".join(_opening(call, index, unopened) for index in range(len(call.choices)))
        while any(c.finish_reason is None for c in call.choices):
            # What came in together leaves in one write.
            deltas = await _next(worker, ticket, call.choices)
            yield b"".join(_opening(call, index, unopened) + _chunk(call, index, delta) for index, delta in deltas)
        options = call.body.stream_options
        wants_usage = options is not None and options.include_usage
        if wants_usage or call.body.return_spec_stats:
            last = call.envelope(call.reply.chunk_object, [])
            if wants_usage:
                last["usage"] = usage(call.choices, call.prompt_tokens, call.body.n)
            if call.body.return_spec_stats:
                last["metrics"] = speculation(call.choices, call.served.engine.info.gamma)
            yield event(last)
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        request.state.problem = f"cut off with {error.status}, {error}"
        yield event(error.body()) + b"data: [DONE]\n\n"


def _opening(call: Call, index: int, unopened: set[int]) -> bytes:
    """The first chunk of a choice, once."""
    if index not in unopened:
        return b""
    unopened.discard(index)
    opening = call.reply.opening(index, call.echo(index), call.prompt_ids(CompletionReply, index))
    if opening is None:
        return b""
    return event(call.envelope(call.reply.chunk_object, [opening], first=True) | call.running_usage)


def _chunk(call: Call, index: int, delta: Delta) -> bytes:
    body = call.body
    shown = call.reply.chunk(index, call.choices[index], delta)
    if shown is None:
        if not (delta.events and (body.return_token_origins or body.return_token_ids)):
            return b""
        empty = Delta("", (), (), (), None, None)
        shown = call.reply.chunk(index, call.choices[index], empty) or {"index": index, "finish_reason": None}
        shown["delta" if isinstance(call.reply, ChatReply) else "text"] = {} if isinstance(call.reply, ChatReply) else ""
    if body.return_token_ids:
        shown["token_ids"] = [e.token_id for e in delta.events]
    chunk = call.envelope(call.reply.chunk_object, [shown])
    if body.return_token_origins:
        shown["origins"] = origins(call.served.texts, delta)
        chunk["metrics"] = speculation([call.choices[index]], call.served.engine.info.gamma)
    return event(chunk | call.running_usage)

"""The two endpoints that make text: from a request body to an answer, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import Response

from draftkit.engine.sampling_params import SamplingParams
from draftkit.serve import params as from_body
from draftkit.serve.call import Call, chunk_of, last_chunk, opening_chunk, values, whole_body
from draftkit.serve.choice import Choice, Delta
from draftkit.serve.grammar_tester import MAX_WAITING
from draftkit.serve.guard import Guarded
from draftkit.serve.limits import MAX_SCORES, MAX_TOLD_SCORES
from draftkit.serve.messages import NamedTool
from draftkit.serve.problem import ApiError, bad_request
from draftkit.serve.protocol import ChatBody, CompletionBody, SamplingBody
from draftkit.serve.reply import ChatReply, CompletionReply
from draftkit.serve.settings import ServeSettings
from draftkit.serve.stream import (
    EventStream,
    body_size,
    read_body,
    unless_client_leaves,
    unless_long,
)
from draftkit.serve.structured import GrammarConstraint, constraint_of
from draftkit.serve.wire import PlainWire, Wire
from draftkit.serve.worker import Served, Ticket, Worker
from draftkit.target.answer_stream import AnswerStream
from draftkit.target.deepseek_v4_prompts import DeepseekFormat

_TAKEN = 64  # outputs that are made into text before others get their turn
# who waits here takes no thread from other requests
_COMPILING = ThreadPoolExecutor(2 * MAX_WAITING, "draftkit-grammar")


@dataclass(frozen=True)
class Prepared:
    """What a body asks of the engine: token ids of each prompt, and the parameters of its `n` answers in
    order."""

    prompts: list[tuple[int, ...]]
    params: list[SamplingParams]


async def completions(request: Request, worker: Worker, settings: ServeSettings) -> Response:
    """POST /v1/completions."""
    body = await read_body(request, CompletionBody, settings.max_body_bytes)
    served = worker.ready()
    from_body.check_model(body.model, served)
    reply = CompletionReply(served.texts, body.return_tokens_as_token_ids)
    wire = PlainWire()
    # one is made, and not shown where none is wanted
    limit = 16 if body.max_tokens is None else max(body.max_tokens, 1)
    asked = len(body.prompt) if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else 1
    prepare = partial(_prepared, body, served, from_body.completion_prompts, limit, body.logprobs)
    return await _answer(request, worker, settings, served, body, reply, asked, prepare, wire)


async def chat_completions(request: Request, worker: Worker, settings: ServeSettings) -> Response:
    """POST /v1/chat/completions."""
    body = await read_body(request, ChatBody, settings.max_body_bytes)
    return await chat(request, worker, settings, body, PlainWire())


async def chat(
    request: Request, worker: Worker, settings: ServeSettings, body: ChatBody, wire: Wire
) -> Response:
    """The response to a chat, written as `wire` has it. Raises ApiError."""
    served = worker.ready()
    from_body.check_model(body.model, served)
    if body.forced_calls is not None and served.prompt_format.call_form is None:
        raise bad_request(
            "tool_choice: the target's chat template has no form for calls that can be demanded (JSON in "
            "<tool_call>); give 'auto' or 'none'",
            "tool_choice",
        )
    reply = ChatReply(
        served.texts,
        body.return_tokens_as_token_ids,
        one_call=not body.parallel_tool_calls,
        named=isinstance(body.tool_choice, NamedTool),
        reasons=body.include_reasoning,
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = body.top_logprobs if body.logprobs else None
    prepare = partial(_prepared, body, served, from_body.chat_prompts, limit, logprobs)
    return await _answer(request, worker, settings, served, body, reply, 1, prepare, wire)


def _prepared(
    body: SamplingBody,
    served: Served,
    prompts_of: Callable[[Any, Served], list[tuple[int, ...]]],
    limit: int | None,
    logprobs: int | None,
    constraint: GrammarConstraint | None,
) -> Prepared:
    """The slow part of a request, once for all its answers: tokenising and checking. Raises ApiError."""
    longest = served.engine.info.max_length
    shared = from_body.sampling_params(body, served, logprobs)
    prompts = [from_body.truncated(p, body, longest, limit) for p in prompts_of(body, served)]
    lengths = [
        from_body.answer_length(body, served, p, _own_limit(body, limit, longest - len(p))) for p in prompts
    ]
    scored = from_body.prompt_logprobs(body)
    told = sum(map(len, prompts)) * (1 + scored) if scored is not None else 0
    for count, most in ((told, MAX_SCORES), (told * body.n, MAX_TOLD_SCORES)):
        if count > most:
            raise bad_request(
                f"prompt_logprobs: {count} log probabilities are more than {most}; ask for fewer at a time"
            )
    own = partial(_guarded, constraint, served)
    return Prepared(
        prompts, [shared.of_answer(i, length, own()) for length in lengths for i in range(body.n)]
    )


def _guarded(constraint: GrammarConstraint | None, served: Served) -> Guarded | None:
    """A copy for one answer, which alone ends when its grammar gives trouble."""
    return Guarded(constraint.copy(), served.engine.info.vocab_size) if constraint is not None else None


def _reader(
    body: ChatBody, served: Served, prompt: Sequence[int]
) -> tuple[Callable[[], AnswerStream] | None, bool]:
    """What takes an answer apart, and whether it needs the special tokens in the text; none for a text
    that has one part only, in a form that the request gave, or with special tokens that were asked for."""
    shown, forced = served.prompt_format, body.forced_calls is not None
    if isinstance(shown, DeepseekFormat):
        plain = (body.form is not None and not forced) or not body.skip_special_tokens
        return (None, False) if plain else (partial(shown.reader, tuple(prompt)), True)
    calls = forced or (bool(body.tools) and body.tool_choice != "none" and shown.style.calls)
    if (body.form is not None and not forced) or not (calls or shown.style.thinks):
        return None, False
    if shown.marks_are_special and not body.skip_special_tokens:
        return None, False
    return partial(shown.reader, () if forced else tuple(prompt), calls), shown.marks_are_special


def _own_limit(body: SamplingBody, limit: int | None, room: int) -> int | None:
    """An unset max_tokens of /v1/completions is 16, or less where the context ends sooner."""
    unset = isinstance(body, CompletionBody) and body.max_tokens is None
    return min(limit, room) if limit is not None and unset and room > 0 else limit


async def _answer(
    request: Request,
    worker: Worker,
    settings: ServeSettings,
    served: Served,
    body: SamplingBody,
    reply: CompletionReply | ChatReply,
    asked: int,
    prepare: Callable[[GrammarConstraint | None], Prepared],
    wire: Wire,
) -> Response:
    """The response to a body that asks for `n` answers to each of `asked` prompts."""
    if asked * body.n > settings.max_choices:
        raise bad_request(
            f"{asked} prompts times n={body.n} is more than the {settings.max_choices} answers that this "
            f"server "
            "makes per request",
            "n" if body.n > 1 else "prompt",
        )
    worker.check_room(asked * body.n)  # before any work is done for it
    # The body's request_id names the request too, as in vLLM; the header goes before it.
    if body.request_id is not None and request.headers.get("x-request-id") != request.state.request_id:
        request.state.request_id = body.request_id
    constraint = None
    if body.form is not None:
        constraint = await asyncio.get_running_loop().run_in_executor(
            _COMPILING, constraint_of, body.form, served
        )
    work = await unless_long(body_size(request), prepare, constraint)
    marked = False
    if isinstance(reply, ChatReply) and isinstance(body, ChatBody):
        reply.reader, marked = _reader(body, served, work.prompts[0])
    choices = [
        Choice(served.texts, params, len(work.prompts[i // body.n]), body.max_tokens == 0, marked)
        for i, params in enumerate(work.params)
    ]
    call = Call(request.state.request_id, int(time.time()), served, body, reply, work.prompts, choices, wire)
    asks = [(call.prompt_of(i), params) for i, params in enumerate(work.params)]
    ticket = await unless_client_leaves(
        request.receive, worker.submit(call.request_id, asks, whole=not body.stream)
    )
    if body.stream:
        return EventStream(_stream(call, worker, ticket, request), on_close=lambda: worker.cancel(ticket))
    try:
        whole = await unless_client_leaves(request.receive, _collect(call, worker, ticket))
    finally:
        worker.cancel(ticket)
    return Response(whole, media_type="application/json")


async def _next(worker: Worker, ticket: Ticket, choices: list[Choice]) -> list[tuple[int, Delta]]:
    """At least one delta: waits for the first output and takes others that are there. Raises ApiError."""
    await asyncio.sleep(0)  # a queue that is never empty never gives way to others
    items = [await ticket.items.get()]
    while not ticket.items.empty() and len(items) < _TAKEN:
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
        if isinstance(guard := choice.params.constraint, Guarded) and guard.error is not None:
            raise bad_request(f"the answer cannot go on in its form: {guard.error}")
        if choice.stopped_by_text:
            worker.finish(ticket, index, "stop", output.stats)
    return deltas


async def _collect(call: Call, worker: Worker, ticket: Ticket) -> bytes:
    """The whole response."""
    pieces: list[list[str]] = [[] for _ in call.choices]
    while any(c.finish_reason is None for c in call.choices):
        for index, delta in await _next(worker, ticket, call.choices):
            pieces[index] += delta.pieces
    return await unless_long(values(call), whole_body, call, pieces)


async def _stream(
    call: Call, worker: Worker, ticket: Ticket, request: Request
) -> AsyncGenerator[bytes, None]:
    """Server-sent events of a response. An error in the middle is an event, and a word in the log: the status
    is sent."""
    try:
        unopened = set(range(len(call.choices)))
        # of answers whose prompt is to be told first, and is not scored yet
        held: list[tuple[int, Delta]] = []
        if not call.echoes_scores:
            yield b"".join(opening_chunk(call, index, unopened) for index in range(len(call.choices)))
        while any(c.finish_reason is None for c in call.choices):
            # What came in together leaves in one write.
            held += await _next(worker, ticket, call.choices)
            ready = [(i, delta) for i, delta in held if not call.echoes_scores or call.scores(i) is not None]
            held = [(i, delta) for i, delta in held if call.echoes_scores and call.scores(i) is None]
            yield b"".join(
                opening_chunk(call, index, unopened) + chunk_of(call, index, delta) for index, delta in ready
            )
        yield last_chunk(call) + call.wire.end()
    except ApiError as error:
        request.state.problem = f"cut off with {error.status}, {error}"
        yield call.wire.cut(error)

"""The engine's thread and what ties it to the event loop.

One thread owns the engine: it takes commands (add, abort) from a queue, calls `engine.step()`, and hands each
step's outputs to the event loop in one call. Outputs that nobody waits for, because the answer is wanted
whole, are held back for a while: waking the event loop takes the processors from the engine's passes. All
other state here belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from draftkit.engine.outputs import RequestStats, StepOutput
from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import DraftkitError
from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.metrics import ServerMetrics
from draftkit.serve.problem import ApiError
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
from draftkit.target.formats import format_of
from draftkit.target.template_format import TemplateFormat

log = logging.getLogger("draftkit.serve")


@dataclass(frozen=True)
class Served:
    """What is loaded: the engine (see the seam in engine/engine.py), the tokenizer, the model's public name,
    the sampling fields of requests that leave them out, where those are not the API's, whether special tokens
    in a client's text count, and variables of the chat template, which requests may set otherwise."""

    engine: Any
    tokenizer: Any
    texts: TokenTexts
    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    honour_special_tokens: bool = False
    template_switches: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def prompt_format(self) -> TemplateFormat | DeepseekFormat:
        """How the target is shown messages."""
        return format_of(self.tokenizer, self.template_switches)


Item = tuple[int, StepOutput] | ApiError
HELD = 0.1  # seconds for which outputs may be held back


@dataclass
class Ticket:
    """One HTTP request's answers: `ids[i]` is the engine's name of choice i; outputs arrive in `items`."""

    ids: tuple[str, ...]
    arrived: float
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    last_output: dict[int, float] = field(default_factory=dict)
    stats: dict[int, RequestStats] = field(default_factory=dict)  # as of the last output
    open: set[int] = field(default_factory=set)


class Worker:
    """Runs `load()` and then the engine in a thread of its own; `state` is loading, ready, draining, failed,
    stopped."""

    def __init__(self, load: Callable[[], Served], metrics: ServerMetrics, max_waiting: int) -> None:
        self._load = load
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        # of the engine's thread: answers that have begun and are wanted whole
        self._patient: set[str] = set()
        # of the engine's thread: with the time of each step
        self._held: list[tuple[float, Sequence[StepOutput]]] = []
        self._tickets: dict[str, tuple[Ticket, int]] = {}
        self._serial = 0
        self._thread = threading.Thread(target=self._run, name="draftkit-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._served: Served | None = None
        self.state = "loading"
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin loading; call it from the event loop that will serve."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The engine's thread still runs."""
        return self._thread.is_alive()

    @property
    def in_flight(self) -> int:
        """Answers that are being made or wait to be."""
        return len(self._tickets)

    def ready(self) -> Served:
        """What is served. Raises ApiError 503 unless requests can be taken now."""
        if self.state == "ready" and self._served is not None:
            return self._served
        if self.state == "draining":
            raise ApiError(
                503, "the server is shutting down; send the request elsewhere", headers={"Retry-After": "5"}
            )
        if self.state == "loading":
            raise ApiError(503, "the model is still loading; try again soon", headers={"Retry-After": "2"})
        raise ApiError(503, "the engine has stopped; the server's log says why")

    def check_room(self, count: int) -> None:
        """Raises ApiError 503 when not ready, 429 when so many answers more would wait than may."""
        room = self.ready().engine.info.max_running + self._max_waiting - self.in_flight
        if self.in_flight and count > room:
            self._metrics.on_rejection("queue_full")
            what = (
                f"there is room for {max(room, 0)} more answers now, and {count} are asked for; try "
                f"again soon"
            )
            raise ApiError(429, what, headers={"Retry-After": "1"})

    async def submit(
        self, name: str, work: Sequence[tuple[Sequence[int], SamplingParams]], whole: bool = False
    ) -> Ticket:
        """Hand answers to the engine; returns when it has taken them all. Outputs of answers that are wanted
        `whole` may come late, but for the first and the last one, and but for answers that a stop string may
        end.

        Raises ApiError: 503 when not ready, 429 when more would wait than may, 400 when the engine refuses.
        An idle server takes any request.
        """
        self.check_room(len(work))
        self._serial += 1
        ticket = Ticket(tuple(f"{name}-{self._serial}-{i}" for i in range(len(work))), time.monotonic())
        for index, request_id in enumerate(ticket.ids):
            self._tickets[request_id] = (ticket, index)
            ticket.open.add(index)
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def add(engine: Any) -> None:
            try:
                for request_id, (tokens, params) in zip(ticket.ids, work, strict=True):
                    engine.add_request(request_id, list(tokens), params)
                    if whole and not params.stop:
                        self._patient.add(request_id)
            except DraftkitError as error:
                self._call(_settle, taken, ApiError(400, str(error)))
            except Exception as error:
                log.exception("the engine could not take a request")
                self._call(_settle, taken, ApiError(500, f"the engine could not take the request: {error!r}"))
            else:
                self._call(_settle, taken, None)

        self._commands.put(add)
        try:
            await taken
        except BaseException:
            self._drop(ticket, *ticket.open)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Abort what is still open of a ticket; does nothing when all is finished."""
        for index in ticket.open:
            if ticket.ids[index] in self._tickets:
                self._metrics.on_abort(ticket.stats.get(index))
        self._drop(ticket, *ticket.open)

    def finish(self, ticket: Ticket, index: int, reason: str, stats: RequestStats) -> None:
        """An answer is complete, which the engine does not know: a stop string was found."""
        if ticket.ids[index] in self._tickets:
            self._metrics.on_finish(time.monotonic() - ticket.arrived, reason, stats)
            self._drop(ticket, index)

    def _drop(self, ticket: Ticket, *indices: int) -> None:
        """The engine gives up some answers of a ticket; outputs that are on their way are dropped."""
        for index in indices:
            request_id = ticket.ids[index]
            if request_id in self._tickets:
                self._forget(request_id)
                self._commands.put(partial(self._abort, request_id))

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        if self.state in ("ready", "loading"):
            self._change("draining")

    def end_all(self, error: ApiError) -> None:
        """Whoever still waits for an answer gets this error instead."""
        for ticket in {id(t): t for t, _ in self._tickets.values()}.values():
            ticket.items.put_nowait(error)
        self._tickets.clear()

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread after its current step. May be called from any thread."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds)

    # ---- the engine's thread ----

    def _run(self) -> None:
        try:
            served = self._load()
            self._call(self._loaded, served)
            self._serve(served.engine)
        except BaseException as error:
            if not isinstance(error, DraftkitError):
                log.exception("the engine stopped")
            self._call(self._failed, error)
        else:
            self._call(self._change, "stopped")

    def _serve(self, engine: Any) -> None:
        before = engine.metrics
        while True:
            command = None
            if not engine.has_work():
                command = self._commands.get()
                if command is None:
                    return
                command(engine)
            while not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command(engine)
            if engine.has_work():
                outputs = engine.step()
                after = engine.metrics
                self._metrics.on_step(before, after)
                before = after
                if outputs:
                    self._held.append((time.monotonic(), outputs))
                urgent = [self._urgent(output) for output in outputs]
                if any(urgent) or (self._held and time.monotonic() - self._held[0][0] >= HELD):
                    self._call(self._dispatch, self._held)
                    self._held = []

    def _urgent(self, output: StepOutput) -> bool:
        """Somebody waits for it."""
        if output.finish_reason is not None:
            self._patient.discard(output.request_id)
            return True
        return output.request_id not in self._patient or output.stats.output_tokens == len(output.events)

    def _abort(self, request_id: str, engine: Any) -> None:
        self._patient.discard(request_id)
        engine.abort(request_id)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Run a function on the event loop; the loop may be gone when the process ends."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    # ---- the event loop ----

    def _change(self, state: str) -> None:
        self.state = state

    def _loaded(self, served: Served) -> None:
        self._served = served
        self._metrics.watch(served.engine, served.name)
        if self.state == "loading":
            self._change("ready")

    def _failed(self, error: BaseException) -> None:
        self.failure = error
        self._change("failed")
        self.end_all(ApiError(500, f"the engine stopped: {error!r}"))

    def _forget(self, request_id: str) -> None:
        ticket, index = self._tickets.pop(request_id)
        ticket.open.discard(index)

    def _dispatch(self, held: Sequence[tuple[float, Sequence[StepOutput]]]) -> None:
        for now, outputs in held:
            for output in outputs:
                self._deliver(now, output)

    def _deliver(self, now: float, output: StepOutput) -> None:
        known = self._tickets.get(output.request_id)
        if known is None:
            return  # aborted while this step ran
        ticket, index = known
        if output.events:
            ticket.stats[index] = output.stats
            last = ticket.last_output.get(index)
            self._metrics.on_tokens(
                now - (ticket.arrived if last is None else last), len(output.events), last is None
            )
            ticket.last_output[index] = now
        if output.finish_reason is not None:
            self._metrics.on_finish(now - ticket.arrived, output.finish_reason, output.stats)
            self._forget(output.request_id)
        ticket.items.put_nowait((index, output))


def _settle(future: asyncio.Future[None], error: ApiError | None) -> None:
    """Finish a future whose waiter may have left."""
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

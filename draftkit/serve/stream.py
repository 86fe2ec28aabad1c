"""Bodies in, events out, and clients that leave: what FastAPI's defaults do not do the way a token stream
needs."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from draftkit.serve.limits import check_size
from draftkit.serve.problem import ApiError, from_validation, shorten
from draftkit.serve.protocol import Body

BodyT = TypeVar("BodyT", bound=Body)
ResultT = TypeVar("ResultT")
LONG = 4096  # bytes; tokenising takes about a microsecond per byte
BODY_SECONDS = 20.0  # that a body may take, and longer by its size where it comes
SLOWEST = 16_384  # bytes of it in a second
_MOST_NAMED = 10  # fields, in a line of the log
STALLED_SECONDS = 60.0  # until a client that does not take what is streamed has left


class ClientLeft(Exception):
    """The client closed the connection before its answer was complete."""


async def read_body(request: Request, kind: type[BodyT], limit: int) -> BodyT:
    """The request's JSON as `kind`; its line in the log names fields that are ignored. Raises ApiError 415,
    413 or 400.

    Only application/json is read: a web page of another origin cannot send it without asking first.
    """
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, f"Content-Type is {media or 'missing'}; send application/json")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip"):
        raise ApiError(
            415,
            f"Content-Encoding is {shorten(encoding)}; send gzip, or the body as it is",
            "content-encoding",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    raw = bytearray()
    until = asyncio.get_running_loop().time() + BODY_SECONDS
    try:
        async with asyncio.timeout_at(until) as timer:
            async for piece in request.stream():
                raw += piece
                if len(raw) > limit:
                    raise _too_large(limit)
                timer.reschedule(until + len(raw) / SLOWEST)
    except ClientDisconnect:
        raise ClientLeft from None
    except TimeoutError:
        slow = (
            f"{len(raw)} bytes of the body came within {BODY_SECONDS:g} s; send {SLOWEST} in a second or more"
        )
        raise ApiError(408, slow, headers={"Connection": "close"}) from None
    if encoding == "gzip":
        raw = await asyncio.to_thread(_unzipped, raw, limit)
    request.state.body_size = len(raw)
    ignored: list[str] = []
    body = await unless_long(len(raw), _parsed, raw, kind, ignored)
    if ignored:
        named = (repr(shorten(name, 40)) for name in ignored[:_MOST_NAMED])
        request.state.problem = f"unknown fields ignored ({len(ignored)}): {', '.join(named)}"
    return body


def _unzipped(raw: bytearray, limit: int) -> bytearray:
    """The body, of which no more is unpacked than may be. Raises ApiError 413 or 400."""
    unpacking = zlib.decompressobj(wbits=31)
    try:
        unpacked = bytearray(unpacking.decompress(raw, limit + 1))
    except zlib.error as error:
        raise ApiError(400, f"the body is no gzip ({error})", "content-encoding") from error
    if len(unpacked) > limit:
        raise _too_large(limit)
    if not unpacking.eof:
        raise ApiError(400, "the body is no gzip (its end is missing)", "content-encoding")
    return unpacked


def _parsed(raw: bytearray, kind: type[BodyT], ignored: list[str]) -> BodyT:
    check_size(raw)
    try:
        return kind.model_validate_json(raw, context=ignored)
    except ValidationError as error:
        raise from_validation(error) from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", headers={"Connection": "close"})


async def unless_long(size: int, work: Callable[..., ResultT], *args: Any) -> ResultT:
    """`work(*args)`, in a thread when its input of `size` bytes would hold up everybody else's streams."""
    return work(*args) if size < LONG else await asyncio.to_thread(work, *args)


def body_size(request: Request) -> int:
    """Bytes of the body that `read_body` has read, unpacked."""
    return int(request.state.body_size)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`; cancels it and raises ClientLeft when the client closes the connection first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_client_leaves(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. `on_close` is called at once however the response ends, even when it never began (a
    generator that was not started runs no `finally`).
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], on_close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until they end or the client leaves."""
        try:
            await unless_client_leaves(receive, self._write(send))
        finally:
            self._on_close()
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                async with asyncio.timeout(STALLED_SECONDS):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:
            raise ClientLeft from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(data) + b"\n\n"


def dump(data: dict[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def joined(one: bytes, other: bytes) -> bytes:
    """Two JSON objects as one that has the fields of both."""
    return one if other == b"{}" else one[:-1] + b"," + other[1:]

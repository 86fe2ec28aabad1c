"""What happens around every request: its id, its line in the log, who may ask for what, errors that nobody
expected."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from draftkit.serve.problem import error_body, printable, shorten
from draftkit.serve.stream import ClientLeft

log = logging.getLogger("draftkit.serve")
_GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# for monitors: answered without a key, and when there is room for nothing else
_QUIET = ("/health", "/ready", "/metrics")
# without a key; everything else needs one
_OPEN = (*_QUIET, "/", "/chat.css", "/chat.js", "/version", "/openapi.json")


class Envelope:
    """ASGI middleware: gives the request an id (the client's X-Request-Id when it is a plain word), guards
    all but the open routes with the API keys, answers HEAD as GET, and logs one line when the response is
    complete, with what was wrong (`state["problem"]`). When `most` requests are being answered, only monitors
    get in.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], most: int) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._most, self._active = most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        # a body may give another
        state["request_id"] = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        began = time.monotonic()
        status = 0

        async def tag(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
            await send(message)

        end = ""
        self._active += 1
        try:
            if (refused := self._refused(scope["path"], headers)) is None:
                # Uvicorn, which keeps the scope with HEAD in it, leaves the body out.
                await self._app(
                    {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, receive, tag
                )
            else:
                await _send_json(tag, scope["path"], *refused)
        except ClientLeft:
            end = "client left"
        # the server ends, and the client has not read its answer; nobody waits for this task
        except asyncio.CancelledError:
            end = "cut off"
        except Exception:
            log.exception("request %s failed", state["request_id"])
            if not status:
                told = f"internal error; the log has it under {state['request_id']}"
                await _send_json(tag, scope["path"], 500, told)
        finally:
            self._active -= 1
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            log.log(
                level,
                "%s %s %s %s %.0f ms%s",
                state["request_id"],
                scope["method"],
                # Not decoded: a path may hold line breaks.
                printable(shorten(scope.get("raw_path", b"").decode("ascii", errors="replace"))),
                end or status,
                1000 * (time.monotonic() - began),
                f": {printable(state['problem'])}" if "problem" in state else "",
            )

    def _refused(self, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason for a request that gets no further."""
        # proxies disagree about where such a body ends
        if "content-length" in headers and "transfer-encoding" in headers:
            return 400, "the request has both Content-Length and Transfer-Encoding; send one of them"
        if self._active > self._most and path not in _QUIET:
            return 503, f"the server answers {self._most} requests at the same time already; try again soon"
        if not self._keys or path in _OPEN:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        # Anthropic's clients have a header of their own; as it came: keys are UTF-8
        given = [key.encode("latin-1") for key in (bearer, headers.get("x-api-key", "").strip()) if key]
        known = [hmac.compare_digest(one, key) for one in given for key in self._keys]
        if any(known):  # all are compared: the time says nothing
            return None
        return 401, "Unauthorized: give the server's API key as a bearer token, or in x-api-key"


async def _send_json(send: Send, path: str, status: int, message: str) -> None:
    """An error, after which the connection is closed where the rest of the request is not to be read."""
    raw = json.dumps(error_body(status, message, path=path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    if status in (400, 401, 503):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})

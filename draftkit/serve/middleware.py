"""What happens around every request: its id, its line in the log, the API key, errors that nobody expected."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from draftkit.serve.problem import error_body, shorten
from draftkit.serve.stream import ClientLeft

log = logging.getLogger("draftkit.serve")
_GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = ("/health", "/ready", "/metrics")


class Envelope:
    """ASGI middleware: gives the request an id (the client's X-Request-Id when it is a plain word), guards /v1 with the
    API keys, answers HEAD as GET, and logs one line when the response is complete, with what was wrong (`state["problem"]`).
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex  # a body may give another
        began = time.monotonic()
        status = 0

        async def tag(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
            await send(message)

        end = ""
        try:
            if self._may_enter(scope["path"], headers.get("authorization", "")):
                # Uvicorn, which keeps the scope with HEAD in it, leaves the body out.
                await self._app({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, receive, tag)
            else:
                await _send_json(tag, 401, error_body(401, "Unauthorized: give the server's API key as a bearer token"))
        except ClientLeft:
            end = "client left"
        except asyncio.CancelledError:  # the server ends, and the client has not read its answer; nobody waits for this task
            end = "cut off"
        except Exception:
            log.exception("request %s failed", state["request_id"])
            if not status:
                await _send_json(tag, 500, error_body(500, f"internal error; the log has it under {state['request_id']}"))
        finally:
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            log.log(
                level,
                "%s %s %s %s %.0f ms%s",
                state["request_id"],
                scope["method"],
                # Not decoded: a path may hold line breaks.
                shorten(scope.get("raw_path", b"").decode("ascii", errors="replace")),
                end or status,
                1000 * (time.monotonic() - began),
                f": {state['problem']}" if "problem" in state else "",
            )

    def _may_enter(self, path: str, authorization: str) -> bool:
        if not self._keys or not (path == "/v1" or path.startswith("/v1/")):
            return True
        scheme, _, token = authorization.partition(" ")
        given = token.strip().encode("latin-1")  # as it came: keys are UTF-8
        known = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(known)


async def _send_json(send: Send, status: int, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})

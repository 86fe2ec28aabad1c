"""HTTP servers that fail in the ways in which servers of models fail, on demand: real HTTP, no model."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_BODIES = {
    "html": b"<html>a page of some proxy</html>",
    "half a body": b'{"choices": [{"tok',
    "other model": b'{"model": "another", "choices": [{"token_ids": [5], "finish_reason": "stop"}]}',
}


class MisbehavingServer(ThreadingHTTPServer):
    """On a free port of this machine, at `url`. `over` ends the waits of its threads."""

    daemon_threads = True

    def __init__(self, handler: type[MisbehavingHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class MisbehavingHandler(BaseHTTPRequestHandler):
    """Answers with `say`, or with `misbehave`."""

    server: MisbehavingServer

    def misbehave(self, trouble: str) -> None:
        """In place of an answer: "hangs", "closes", "html", "half a body", "other model", or a status."""
        if trouble == "hangs":
            self.server.over.wait()
        elif trouble == "closes":
            self.connection.close()
        elif trouble in _BODIES:
            self.say(200, _BODIES[trouble])
        else:
            self.say(int(trouble), b'{"error": {"message": "not now"}}', {"retry-after": "0.05"})

    def say(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """One whole response."""
        self.send_response(code)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

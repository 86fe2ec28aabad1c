"""A server that says of each answer how much was drafted and accepted, as it is told to."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub(ThreadingHTTPServer):
    """Says of every answer how much was drafted and accepted; `again` replaces the second number where a
    prompt comes again. Without `tells` it says nothing."""

    daemon_threads = True

    def __init__(self, accepted: int, again: int, tells: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.accepted, self.again, self.tells, self.seen = accepted, again, tells, Counter[str]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self._send("application/json", json.dumps({"data": [{"id": "m"}]}) if "models" in self.path else "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][0]["content"]
        kept = self.server.again if self.server.seen[prompt] else self.server.accepted
        self.server.seen[prompt] += 1
        told = {"num_spec_steps": 10, "num_draft_tokens": 40, "num_accepted_draft_tokens": kept}
        chunk: dict[str, Any] = {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}
        if self.server.tells:
            chunk["metrics"] = {"speculative_decoding": told}
        self._send("text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def stub(*args: Any) -> Iterator[str]:
    server = Stub(*args)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()

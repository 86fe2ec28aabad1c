"""An OpenAI-compatible server that answers what the prompt's ids say, or misbehaves on demand. Real HTTP, no
model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "the-model"


def answer_to(prompt: Sequence[int]) -> list[int]:
    """The ids that the stub answers to a prompt: they can be checked, and depend on nothing else."""
    return [5 + sum(prompt) % 50, 6, 7]


class StubServer(ThreadingHTTPServer):
    """`trouble` is what it answers in place of an answer: "429", "html", "500", "other model", "partial",
    "dead", "hangs", or "slow", which answers late."""

    daemon_threads = True

    def __init__(self, prompt_tokens: int, ids: bool = True, trouble: str = "", well_for: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.prompt_tokens, self.ids, self.trouble, self.well_for = prompt_tokens, ids, trouble, well_for
        self.answered: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": MODEL, "max_model_len": 200}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        probing = body["max_tokens"] == 1
        if not probing:
            self.server.asked.append(body)
            if self.server.trouble == "slow":
                self.server.over.wait(0.5)
            elif len(self.server.answered) >= self.server.well_for and self.server.trouble:
                return self._misbehave(self.server.trouble)
        choice: dict[str, Any] = {"finish_reason": "stop"}
        if self.path == "/v1/completions":
            if self.server.ids:
                choice["token_ids"] = answer_to(body["prompt"])
            self.server.answered += [] if probing else [tuple(body["prompt"])]
        else:
            choice["message"] = {
                "role": "assistant",
                "content": "an answer",
                "reasoning_content": "a thought",
            }
            self.server.answered += [] if probing else [json.dumps(body["messages"])]
        self._say(
            200, {"model": MODEL, "choices": [choice], "usage": {"prompt_tokens": self.server.prompt_tokens}}
        )

    def _misbehave(self, trouble: str) -> None:
        if trouble == "429":
            self._say(429, {"error": {"message": "busy"}}, {"retry-after": "0.05"})
        elif trouble == "html":
            self._raw(200, b"<html>a proxy's page</html>")
        elif trouble == "partial":
            self._raw(200, b'{"choices": [{"tok')
        elif trouble == "500":
            self._say(500, {"error": "broken"})
        elif trouble == "400":
            self._say(400, {"error": {"message": "no such thing"}})
        elif trouble == "other model":
            self._say(200, {"model": "another", "choices": [{"token_ids": [1], "finish_reason": "stop"}]})
        elif trouble == "dead":
            self.connection.close()
        elif trouble == "hangs":
            self.server.over.wait()

    def _say(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._raw(code, json.dumps(body).encode(), headers)

    def _raw(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def stubs(*servers: StubServer) -> Iterator[list[StubServer]]:
    """Run servers in threads while the block runs."""
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield list(servers)
    finally:
        for server in servers:
            server.over.set()
            server.shutdown()
            server.server_close()

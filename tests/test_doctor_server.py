"""A server is asked whether it accepts what it should, and still does after a prefix cache hit."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from draftkit.doctor.server import check_server
from draftkit.errors import ServeError
from support.server import ASSET, SERVE, serving

PROMPTS = ["What is a list?", "Step 1: 3 + 4 = ?"]


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


def test_a_hole_after_a_prefix_cache_hit_is_named() -> None:
    with stub(24, 2) as url:
        findings, facts = check_server(url, None, PROMPTS, expected=3.4)
    [finding] = findings
    assert finding.check == "prefix cache" and "1.20, the first time 3.40" in finding.what
    assert "accepted length 3.40 on 2 prompts" in facts[0]


def test_a_server_that_accepts_less_than_draftkit_is_named() -> None:
    with stub(1, 1) as url:
        findings, _ = check_server(url, None, PROMPTS, expected=2.0)
    [finding] = findings
    assert finding.check == "server acceptance" and "45 %" in finding.cost


def test_a_sound_server_has_no_finding() -> None:
    with stub(24, 24) as url:
        assert check_server(url, None, PROMPTS, expected=3.4)[0] == []


def test_a_server_that_tells_nothing_or_does_not_answer_is_an_error() -> None:
    with stub(24, 24, False) as url, pytest.raises(ServeError, match="says nothing of drafting"):
        check_server(url, None, PROMPTS, expected=None)
    with pytest.raises(ServeError, match="does not answer"):
        check_server("http://127.0.0.1:9", None, PROMPTS, expected=None)


@pytest.mark.slow
def test_our_own_server_has_no_hole() -> None:
    """The very pair, with a prefix cache that the drafter reads, too."""
    with serving("--drafter", str(ASSET / "drafter"), "--plan", "fixed", command=SERVE) as server:
        findings, facts = check_server(server.url, None, PROMPTS, expected=None)
    assert findings == []
    assert "accepted length" in facts[0]

"""Connections that are there to be in the way: slow, silent, too many, or of two minds about where a request
ends."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.server import Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-connections", "40", "--api-key", "k") as running:
        running.http.headers["Authorization"] = "Bearer k"
        yield running


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    """It waits two seconds where the other one waits ten and twenty."""
    waits = ("draftkit.serve.connections.HEAD_SECONDS=2", "draftkit.serve.stream.BODY_SECONDS=2")
    with serving("--api-key", "k", *(word for wait in waits for word in ("--constant", wait))) as running:
        yield running


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    with connection:
        pieces = []
        while piece := connection.recv(2**16):
            pieces.append(piece)
    return b"".join(pieces)


HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\nContent-Type: "
    b"application/json\r\n"
)


def test_a_client_that_does_not_go_on_is_told_and_closed(impatient: Server) -> None:
    """Else it would never be: it is silent, sends half a head, or half a body."""
    said = (b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ", HEAD + b'Content-Length: 99\r\n\r\n{"pro')
    waiting = [impatient.connect(sent) for sent in said]
    for connection in waiting:
        assert rest(connection).startswith(b"HTTP/1.1 408")


def test_a_body_that_comes_in_drops_is_not_waited_for(impatient: Server) -> None:
    """Closed before its end comes, which would take minutes."""
    with impatient.connect(HEAD + b"Content-Length: 5000\r\n\r\n") as connection:
        try:
            for _ in range(4999):
                connection.sendall(b" ")
                time.sleep(0.1)
        except OSError:  # closed
            return
    pytest.fail("it was waited for")


def test_idle_connections_make_room_and_health_always_answers(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(server.connect())
        for _ in range(3):
            answer = rest(server.connect(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
            assert answer.startswith(b"HTTP/1.1 200")
        assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_request_with_two_lengths_is_refused_and_closed(server: Server) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    head = HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % len(chunk)
    told = rest(server.connect(head + chunk + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert told.startswith(b"HTTP/1.1 400") and told.count(b"HTTP/1.1") == 1


def test_the_log_holds_nothing_that_a_terminal_obeys(server: Server) -> None:
    odd = "\x1b[31m\u202eevil\x07\x9b"
    server.http.post("/v1/completions", json={"model": odd, "prompt": "a"}, headers={"X-Request-Id": "odd1"})
    server.http.post(
        "/v1/chat/completions", json={"messages": [{"role": odd}]}, headers={"X-Request-Id": "odd2"}
    )
    for name in ("odd1 ", "odd2 "):
        line = server.logged(name)
        assert line.rstrip("\n").isprintable(), repr(line)
    assert "\\x1b[31m\\u202eevil" in server.logged("odd1 ")


def test_what_a_client_wrote_does_not_come_back_at_length(server: Server) -> None:
    body = {"prompt": "a", "structured_outputs": {"x" * 500_000: 1}}
    assert len(server.http.post("/v1/completions", json=body).content) < 4096


def test_all_routes_but_those_of_monitors_and_the_page_need_the_key(server: Server) -> None:
    without = {"Authorization": ""}
    opened = ("/health", "/ready", "/metrics", "/version", "/", "/chat.js", "/chat.css", "/openapi.json")
    assert {path: server.http.get(path, headers=without).status_code for path in opened} == dict.fromkeys(
        opened, 200
    )
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/tokenize",
        "/detokenize",
    ):
        assert server.http.post(path, json={}, headers=without).status_code == 401
    assert server.http.get("/v1/models", headers=without).status_code == 401


def test_bodies_may_be_zipped_and_not_without_bound(server: Server) -> None:
    def send(raw: bytes) -> int:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return server.http.post("/v1/completions", content=raw, headers=headers).status_code

    whole = gzip.compress(json.dumps({"prompt": "a", "max_tokens": 1}).encode())
    assert [send(whole), send(whole[:-4]), send(b"plain"), send(b"")] == [200, 400, 400, 400]
    assert send(gzip.compress(b" " * 2**26)) == 413


def test_pages_of_an_origin_that_is_allowed_may_ask() -> None:
    asks = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    with (
        serving("--api-key", "k", "--allow-origin", "https://example.com") as allowing,
        serving("--api-key", "k") as strict,
    ):
        told = [s.http.options("/v1/models", headers=asks).headers for s in (allowing, strict)]
        assert [t.get("access-control-allow-origin") for t in told] == ["https://example.com", None]
        other = allowing.http.get("/health", headers={"Origin": "https://example.org"})
        assert "access-control-allow-origin" not in other.headers

"""A server process for tests: start it, read its log, end it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from support.patience import PATIENCE, wait_until

ASSET = Path(__file__).parents[2] / "draftkit" / "assets" / "tiny"
SERVE = (sys.executable, "-m", "draftkit.cli", "serve", "--port", "0")
FAKE = Path(__file__).parent / "fake_engine.py"
TEXT = "The quick brown fox – naïve, 日本 – jumps over the lazy dog. " * 3
ENDED = ""  # the last entry of the log of a process that has ended
CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


class Server:
    def __init__(self, process: subprocess.Popen[str], url: str, log: list[str]) -> None:
        self.process, self.url, self.log = process, url, log
        self.http = httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False)

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return sum(s.value for f in families for s in f.samples if s.name == f"draftkit:{name}")

    def wait_for_running(self, count: int) -> None:
        """Until so many answers are being made."""
        wait_until(lambda: self.metric("num_requests_running") == count, f"{count} answers being made")

    def logged(self, pattern: str) -> str:
        """The first line of the log that matches, once it is there."""

        def found() -> str | None:
            return next((line for line in self.log if re.search(pattern, line)), None)

        wait_until(lambda: found() or self.process.poll() is not None, f"{pattern!r} in the log")
        if found() is None:  # the last lines of a process that ended are still being read
            wait_until(lambda: found() or self.log[-1:] == [ENDED], f"{pattern!r} in the log")
        line = found()
        assert line is not None, f"{pattern!r} is not in the log: {self.log}"
        return line

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection on which this was sent."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), PATIENCE)
        connection.sendall(sent)
        return connection

    def ask(self, path: str, body: dict[str, Any], name: str = "asked") -> socket.socket:
        """A connection on which a whole request was sent, with a name for the log; nothing of its answer has
        been read."""
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {name}\r\nContent-Type: application/json"
        return self.connect(head.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)


@contextmanager
def serving(*options: str, command: Sequence[str] = (sys.executable, str(FAKE))) -> Iterator[Server]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    log: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=_read, args=(process.stderr, log), daemon=True)
    reader.start()
    try:
        server = Server(process, "", log)
        url = re.search(r"http://\S+", server.logged("listening on"))
        assert url is not None
        server = Server(process, url.group(), log)
        wait_until(lambda: _is_ready(server), "a server that is ready")
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join(5)  # what it had started may hold the pipe a little longer


def _is_ready(server: Server) -> bool:
    assert server.process.poll() is None, f"the server has ended: {server.log}"
    try:
        return server.http.get("/ready").status_code == 200
    except httpx.TransportError:  # it closed the connection: this process stood still for too long
        return False


def _read(stream: Any, log: list[str]) -> None:
    for line in stream:
        log.append(line)
    log.append(ENDED)

"""A server process for tests: start it, read its log, end it. draftkit's own and the stand-in are forked from
a process that has imported everything (`checks/forked.py`); another command is a program of its own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from checks import forked
from support import fake_engine
from support.patience import PATIENCE, wait_until

ASSET = Path(__file__).parents[2] / "draftkit" / "assets" / "tiny"
DRAFTKIT = (sys.executable, "-m", "draftkit.cli")
SERVE = (*DRAFTKIT, "serve", "--port", "0")
FAKE = Path(__file__).parent / "fake_engine.py"
STAND_IN = (sys.executable, str(FAKE))
TEXT = "The quick brown fox – naïve, 日本 – jumps over the lazy dog. " * 3
CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


class Forked:
    """A forked process with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self.pid, self._process = process.pid, process

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


class Server:
    http: httpx.Client

    def __init__(self, process: Forked | subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.url, self._log = process, "", log

    @contextmanager
    def asked(self) -> Iterator[None]:
        """With a client for it, once it listens. Each request has a connection of its own: one that was kept
        may be closed by the server while this process stands still."""
        url = re.search(r"http://\S+", self.logged("listening on"))
        assert url is not None
        self.url, alone = url.group(), httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, limits=alone) as self.http:
            yield

    @property
    def log(self) -> list[str]:
        """Its lines so far."""
        return self._log.read_text("utf-8", "replace").splitlines()

    def metric(self, *names: str) -> float:
        """The sum of these metrics at one moment."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        wanted = {f"draftkit:{name}" for name in names}
        return sum(s.value for f in families for s in f.samples if s.name in wanted)

    def wait_for_running(self, count: int) -> None:
        """Until so many answers are being made."""
        wait_until(lambda: self.metric("num_requests_running") == count, f"{count} answers being made")

    def logged(self, pattern: str) -> str:
        """The first line of the log that matches, once it is there."""

        def found() -> str | None:
            return next((line for line in self.log if re.search(pattern, line)), None)

        wait_until(lambda: found() or self.process.poll() is not None, f"{pattern!r} in the log")
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
def serving(*options: str, command: Sequence[str] = STAND_IN) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        log.touch()
        process = _started((*command, *options), log)
        try:
            server = Server(process, log)
            with server.asked():
                wait_until(lambda: _is_ready(server), "a server that is ready")
                yield server
        finally:
            process.kill()
            process.wait()


def _started(command: tuple[str, ...], log: Path) -> Forked | subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if command[:3] == DRAFTKIT:
        return Forked(forked.start(command[3:], log, environment=environment))
    if command[:2] == STAND_IN:
        return Forked(forked.start(command[2:], log, environment=environment, program=fake_engine.main))
    with log.open("wb") as file:
        return subprocess.Popen(command, stderr=file, env=environment)


def _is_ready(server: Server) -> bool:
    assert server.process.poll() is None, f"the server has ended: {server.log}"
    return server.http.get("/ready").status_code == 200

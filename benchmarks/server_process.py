"""A `draftkit serve` process for the benchmarks: started, waited for, read, killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

PATIENCE = 600.0  # seconds for loading, for compiling, and for an answer, on the slowest machine


@dataclass
class ServerProcess:
    """A running server. `ready_seconds` is the time from the start of the process to the first 200 of
    /ready."""

    process: subprocess.Popen[str]
    url: str = ""
    ready_seconds: float = 0.0
    log: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.url.rsplit(":", 1)[1])

    @property
    def megabytes(self) -> float:
        """Resident memory, MiB."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples; `name` without "draftkit:"."""
        text = httpx.get(self.url + "/metrics", timeout=PATIENCE, trust_env=False).text
        found = [
            s for f in text_string_to_metric_families(text) for s in f.samples if s.name == f"draftkit:{name}"
        ]
        if not found:
            raise KeyError(name)
        return sum(s.value for s in found)

    def wait_for_log(self, pattern: str) -> str:
        """The first line of the log that matches. Raises TimeoutError, or RuntimeError when the process ended
        before."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            found = next((line for line in self.log if re.search(pattern, line)), None)
            if found is not None:
                return found
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self.process.returncode}: {''.join(self.log[-5:])}"
                )
            time.sleep(0.01)
        raise TimeoutError(f"{pattern!r} is not in the server's log: {''.join(self.log[-5:])}")

    def wait_until_idle(self) -> bool:
        """Wait until no answer is being made or waits; False when that took more than PATIENCE."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self.metric("num_requests_running") + self.metric("num_requests_waiting") == 0:
                return True
            time.sleep(0.05)
        return False


@contextmanager
def server_process(*options: str, threads: int = 1) -> Iterator[ServerProcess]:
    """Start `draftkit serve`, wait until it is ready, and kill it at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "draftkit.cli", "serve", "--threads", str(threads), *options]
    began = time.monotonic()
    server = ServerProcess(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        found = re.search(r"http://\S+", server.wait_for_log("listening on"))
        server.url = found.group() if found else ""
        _wait_until_ready(server)
        server.ready_seconds = time.monotonic() - began
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        reader.join(5)


def _wait_until_ready(server: ServerProcess) -> None:
    """/ready says 503 while the model loads, and nothing answers when loading failed."""
    with httpx.Client(trust_env=False, timeout=PATIENCE) as http:
        while not _is_ready(http, server.url):
            if server.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {server.process.returncode}: {''.join(server.log[-5:])}"
                )
            time.sleep(0.01)


def _is_ready(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(url + "/ready").status_code == 200
    except httpx.TransportError:
        return False


def _read(server: ServerProcess) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log.append(line)

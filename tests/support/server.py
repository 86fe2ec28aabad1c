"""A server process for tests: start it, read its log, end it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ASSET = Path(__file__).parents[2] / "draftkit" / "assets" / "tiny"
SERVE = (sys.executable, "-m", "draftkit.cli", "serve", "--port", "0")
FAKE = Path(__file__).parent / "fake_engine.py"
TEXT = "The quick brown fox – naïve, 日本 – jumps over the lazy dog. " * 3
CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


class Server:
    def __init__(self, process: subprocess.Popen[str], url: str, log: list[str]) -> None:
        self.process, self.url, self.log = process, url, log
        self.http = httpx.Client(base_url=url, timeout=15, trust_env=False)

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return sum(s.value for f in families for s in f.samples if s.name == f"draftkit:{name}")

    def logged(self, pattern: str, seconds: float = 5) -> str:
        for _ in range(int(seconds * 50)):
            found = next((line for line in self.log if re.search(pattern, line)), None)
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} is not in the log: {self.log}")


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
        url = re.search(r"http://\S+", server.logged("listening on", 20))
        assert url is not None
        server = Server(process, url.group(), log)
        for _ in range(1200):
            if server.http.get("/ready").status_code == 200:
                break
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait(10)
        reader.join(5)


def _read(stream: Any, log: list[str]) -> None:
    for line in stream:
        log.append(line)

"""How long /health takes while each field of the API is filled to its cap, and beyond it.

    python -m checks.full_fields --most 0.5

Starts a server over the stand-in engine of the tests and keeps it on one processor, sends each body once and
asks /health without a pause meanwhile. Prints a line for each body and one line of JSON with the slowest
/health of all; exit code 1 when that took longer than `--most` seconds. On a machine that others use, too,
their pauses count: look at the line, and run it again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from draftkit.serve import limits

ENGINE = Path(__file__).parents[1] / "tests" / "support" / "fake_engine.py"
BODY = 2**23
WORD = "stumbling block " * (limits.MAX_WORD // 16)
LONG_TEXT = "The quick brown fox jumps over the lazy dog. " * (BODY // 46)
MESSAGE = {"role": "user", "content": "a"}
SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(5000)}}
N = limits.MAX_CHOICES

COMPLETIONS: dict[str, dict[str, Any]] = {
    "bad_words": {
        "n": N,
        "bad_words": [f"{i} {WORD}"[: limits.MAX_WORD] for i in range(limits.MAX_BAD_WORDS)],
    },
    "bad_words without cap": {"n": 32, "bad_words": ["word " * 50_000]},
    "stop": {"n": N, "stop": [f"{i} {WORD}"[: limits.MAX_WORD] for i in range(limits.MAX_STOPS)]},
    "stop_token_ids": {"n": N, "stop_token_ids": list(range(limits.MAX_STOP_IDS))},
    "stop_token_ids without cap": {"n": 24, "stop_token_ids": [5] * 500_000},
    "logit_bias": {"n": N, "logit_bias": {str(i): 1 for i in range(2000)}},
    "allowed_token_ids": {"n": N, "allowed_token_ids": [5] * limits.MAX_ALLOWED_IDS},
    "prompt": {"prompt": LONG_TEXT},
    "prompt cut": {"prompt": LONG_TEXT, "truncate_prompt_tokens": 10},
    "prompts": {"prompt": ["a few words"] * limits.MAX_PROMPTS},
    "prompt of ids": {"prompt": [5] * (limits.MAX_VALUES - 10)},
    "prompt_logprobs": {"n": 50, "prompt": [5] * 400, "prompt_logprobs": limits.MAX_LOGPROBS},
    "prompt_logprobs echoed": {"n": 50, "prompt": [5] * 400, "echo": True, "logprobs": limits.MAX_LOGPROBS},
    "prompt_logprobs without cap": {"n": N, "prompt": [5] * 400, "prompt_logprobs": limits.MAX_LOGPROBS},
    "logprobs": {"n": N, "max_tokens": 100, "ignore_eos": True, "logprobs": limits.MAX_LOGPROBS},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    "choice": {"structured_outputs": {"choice": ["some text to choose " * 5 + str(i) for i in range(5000)]}},
    "values": {"user_data": [[]] * (BODY // 5)},
    "objects": {"user_data": [{}] * (BODY // 5)},
    "names": {"x" * (BODY - 1000): 1},
}
CHATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [MESSAGE] * limits.MAX_MESSAGES},
    "messages without cap": {"messages": [MESSAGE] * (BODY // 40)},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 16_000}]},
    "parts without cap": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * (BODY // 34)}]
    },
    "tools": {"messages": [MESSAGE], "tools": [{"function": {"name": "f" * 5000}}] * limits.MAX_TOOLS},
    "content": {"messages": [{"role": "user", "content": LONG_TEXT}]},
    "template": {"messages": [MESSAGE], "chat_template_kwargs": {"x": LONG_TEXT}},
}
RESPONSES: dict[str, dict[str, Any]] = {
    "input": {"input": LONG_TEXT},
    "items": {"input": [MESSAGE] * limits.MAX_MESSAGES},
    "items without cap": {"input": [MESSAGE] * (BODY // 40)},
    "instructions": {"input": "a", "instructions": LONG_TEXT},
}
MESSAGES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [MESSAGE] * limits.MAX_MESSAGES},
    "messages without cap": {"messages": [MESSAGE] * (BODY // 40)},
    "system": {"messages": [MESSAGE], "system": LONG_TEXT},
}
TOKENIZE: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": LONG_TEXT},
    "strings": {"prompt": "a b " * 20_000, "return_token_strs": True},
}
DETOKENIZE = {"tokens": {"tokens": [5] * (limits.MAX_VALUES - 10)}}
CASES = [
    *(
        ("/v1/completions", name, {"prompt": "a", "max_tokens": 2, **fields})
        for name, fields in COMPLETIONS.items()
    ),
    *(("/v1/chat/completions", name, {"max_tokens": 2, **fields}) for name, fields in CHATS.items()),
    *(("/v1/responses", name, {"max_output_tokens": 2, **fields}) for name, fields in RESPONSES.items()),
    *(("/v1/messages", name, {"max_tokens": 2, **fields}) for name, fields in MESSAGES.items()),
    *(("/tokenize", name, fields) for name, fields in TOKENIZE.items()),
    *(("/detokenize", name, fields) for name, fields in DETOKENIZE.items()),
]


class PeakMemory:
    """The most memory that a process has had since now, in bytes; 0 where the system does not tell."""

    def __init__(self, pid: int) -> None:
        self._process = Path(f"/proc/{pid}")
        if self._process.exists():
            (self._process / "clear_refs").write_text("5")

    def above(self, before: int) -> int:
        """Bytes more than `before`."""
        if not self._process.exists():
            return 0
        lines = (self._process / "status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 - before


class Asking:
    """Asks /health without a pause; `slowest` in seconds."""

    def __init__(self, url: str) -> None:
        self.slowest, self.count, self._url, self._on = 0.0, 0, url, True
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as http:
            while self._on:
                began = time.monotonic()
                try:
                    http.get("/health").raise_for_status()
                except httpx.HTTPError as error:
                    self._failed = error
                    return
                self.slowest, self.count = max(self.slowest, time.monotonic() - began), self.count + 1
                time.sleep(0.01)

    def _wait(self, count: int) -> None:
        while self.count < count and self._thread.is_alive():
            time.sleep(0.005)

    @contextmanager
    def during(self) -> Iterator[Asking]:
        """Ask until the block is over, at least once in it and once after."""
        self._thread.start()
        self._wait(1)
        try:
            yield self
        finally:
            self._wait(self.count + 2)  # one that was asked while the request was served, and one after it
            self._on = False
            self._thread.join()
        if self._failed is not None:
            raise self._failed


@contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is ready, and its URL. Raises SystemExit when it ends before."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    found: list[str] = []

    def read() -> None:
        for line in process.stderr or ():
            found.extend(re.findall(r"listening on (http://\S+)", line))

    threading.Thread(target=read, daemon=True).start()
    try:
        while not found or httpx.get(found[0] + "/ready", trust_env=False).status_code != 200:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with code {process.returncode}; run {' '.join(command)}")
            time.sleep(0.05)
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving() -> Iterator[tuple[int, str]]:
    """A server that takes bodies of BODY bytes, on one processor: its process id and URL."""
    options = ["--max-body-bytes", str(BODY), "--step-seconds", "0.02"]
    with started([sys.executable, str(ENGINE), *options]) as (process, url):
        if hasattr(os, "sched_setaffinity"):
            for thread in psutil.Process(process.pid).threads():
                os.sched_setaffinity(thread.id, {min(os.sched_getaffinity(0))})
        yield process.pid, url


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=float, default=0.5, help="seconds that /health may take")
    given = parser.parse_args()
    slowest = {}
    with serving() as (pid, url):
        for path, name, body in CASES:
            raw = json.dumps(body, separators=(",", ":")).encode()[: BODY + 1]
            before, peak = psutil.Process(pid).memory_info().rss, PeakMemory(pid)
            with Asking(url).during() as asking:
                headers = {"Content-Type": "application/json"}
                answer = httpx.post(url + path, content=raw, headers=headers, timeout=60, trust_env=False)
            slowest[f"{path} {name}"] = asking.slowest
            told = f"/health {asking.slowest:.3f} s of {asking.count}"
            print(f"{path} {name}: {answer.status_code}, {told}, {peak.above(before) / 2**20:+.0f} MiB")
    worst = max(slowest, key=lambda case: slowest[case])
    print(json.dumps({"cases": len(slowest), "slowest": worst, "seconds": round(slowest[worst], 3)}))
    sys.exit(slowest[worst] > given.most)


if __name__ == "__main__":
    main()

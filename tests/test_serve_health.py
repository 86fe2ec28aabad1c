"""While each field of the API is filled to its cap, /health answers within half a second, and signals are
taken within one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from draftkit.serve import limits
from support.server import Server, serving

BODY = 2**23
LATEST = 0.5  # seconds
MOST_MEMORY = 100 * 2**20  # bytes that a body of 8 MiB may take over what there was
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
        if not self._process.exists():
            return 0
        lines = (self._process / "status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 - before


class Asking:
    """Asks /health without a pause; `slowest` in seconds."""

    def __init__(self, url: str) -> None:
        self.slowest, self.count, self._url, self._on = 0.0, 0, url, True
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as http:
            while self._on:
                began = time.monotonic()
                assert http.get("/health").status_code == 200
                self.slowest, self.count = max(self.slowest, time.monotonic() - began), self.count + 1
                time.sleep(0.01)

    def _wait(self, count: int) -> None:
        while self.count < count and self._thread.is_alive():
            time.sleep(0.005)

    @contextmanager
    def during(self) -> Iterator[Asking]:
        self._thread.start()
        self._wait(1)
        try:
            yield self
        finally:
            self._wait(self.count + 2)  # one that was asked while the request was served, and one after it
            self._on = False
            self._thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-body-bytes", str(BODY), "--step-seconds", "0.02") as running:
        if hasattr(os, "sched_setaffinity"):
            cores = os.sched_getaffinity(0)
            for thread in psutil.Process(running.process.pid).threads():
                os.sched_setaffinity(thread.id, {min(cores)})
        yield running


@pytest.mark.parametrize(
    ("path", "name", "body"), CASES, ids=[f"{path[1:]}-{name}" for path, name, _ in CASES]
)
def test_health_answers_while_a_field_is_full(
    server: Server, path: str, name: str, body: dict[str, Any]
) -> None:
    raw = json.dumps(body, separators=(",", ":")).encode()[: BODY + 1]
    # others use this machine, too: a pause of theirs does not come twice in the same place
    for _ in range(3):
        before, peak = psutil.Process(server.process.pid).memory_info().rss, PeakMemory(server.process.pid)
        with Asking(server.url).during() as asking:
            answer = server.http.post(
                path, content=raw, headers={"Content-Type": "application/json"}, timeout=60
            )
        grown = psutil.Process(server.process.pid).memory_info().rss - before
        assert answer.status_code in (200, 400, 413) and len(answer.content) < 2**27
        most = peak.above(before)
        told = f"/health {asking.slowest:.3f} s of {asking.count}, memory {grown / 2**20:+.0f} MiB"
        told += f", at its peak {most / 2**20:+.0f} MiB"
        print(f"{name}: {answer.status_code}, {told}")
        assert most <= MOST_MEMORY or len(raw) < BODY // 2
        if asking.slowest < LATEST:
            break
    assert asking.count and asking.slowest < LATEST


def test_a_signal_is_taken_while_a_request_is_being_read() -> None:
    with serving("--max-body-bytes", str(BODY)) as server:
        body = {"prompt": LONG_TEXT, "n": N, **COMPLETIONS["bad_words"]}
        thread = threading.Thread(target=lambda: server.http.post("/v1/completions", json=body, timeout=60))
        thread.start()
        time.sleep(0.05)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.logged("shutting down", 10)
        took = time.monotonic() - began
        thread.join()
        assert server.process.wait(20) == 0
        assert took < 1

"""An OpenAI-compatible server that answers what the prompt's ids say, or misbehaves on demand. Real HTTP, no
model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from checks.misbehaving import MisbehavingHandler, MisbehavingServer
from support.patience import PATIENCE

MODEL = "the-model"


def answer_to(prompt: Sequence[int]) -> list[int]:
    """The ids that the stub answers to a prompt: they can be checked, and depend on nothing else."""
    return [5 + sum(prompt) % 50, 6, 7]


class StubServer(MisbehavingServer):
    """After `well_for` answers it is in `trouble`: a misbehaviour, or "slow", which answers late. With
    `first` it answers its first question when so many servers have been asked theirs."""

    def __init__(
        self,
        prompt_tokens: int,
        ids: bool = True,
        trouble: str = "",
        well_for: int = 0,
        first: threading.Barrier | None = None,
    ) -> None:
        super().__init__(_Handler)
        self.first, self.lock = first, threading.Lock()
        self.prompt_tokens, self.ids, self.trouble, self.well_for = prompt_tokens, ids, trouble, well_for
        self.answered: list[Any] = []
        self.asked: list[dict[str, Any]] = []


class _Handler(MisbehavingHandler):
    server: StubServer

    def do_GET(self) -> None:
        self._say({"data": [{"id": MODEL, "max_model_len": 200}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        probing = body["max_tokens"] == 1
        if not probing:
            self.server.asked.append(body)
            with self.server.lock:
                first, self.server.first = self.server.first, None
            if first:
                first.wait(PATIENCE)
            if self.server.trouble == "slow":
                self.server.over.wait(0.5)
            elif len(self.server.answered) >= self.server.well_for and self.server.trouble:
                return self.misbehave(self.server.trouble)
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
            {"model": MODEL, "choices": [choice], "usage": {"prompt_tokens": self.server.prompt_tokens}}
        )

    def _say(self, body: Any) -> None:
        self.say(200, json.dumps(body).encode())


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

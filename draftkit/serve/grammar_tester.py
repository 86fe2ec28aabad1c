"""The server's side of `grammar_check`: a process that tries new grammars, one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from draftkit.serve.problem import ApiError

MAX_WAITING = 16  # grammars that wait to be tried


class GrammarTester:
    """A process of `grammar_check`, started when it is first asked and whenever it has ended.

    `pace` is "quick" or "slow", `setup` what it needs to know of the tokenizer.
    """

    def __init__(self, pace: str, setup: dict[str, Any]) -> None:
        self._pace, self._setup = pace, setup
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until nobody else asks. Raises ApiError 503 when too many wait."""
        if not self._waiting.acquire(blocking=False):
            raise ApiError(
                503, "too many new grammars wait to be compiled; try again soon", headers={"Retry-After": "2"}
            )
        try:
            with self._lock:
                yield
        finally:
            self._waiting.release()

    def ask(self, source: str) -> dict[str, Any]:
        """What the process says of a source (`GrammarSource.dump`); in one's `turn`. Raises ValueError when
        the process ended without an answer."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "draftkit.serve.grammar_check", self._pace],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for the server, which closes the pipe when it ends
            )
            self._say(json.dumps(self._setup))
        self._say(source)
        said = self.process.stdout.readline() if self.process.stdout is not None else ""
        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError:
            # no answer, or something else was written: later answers would be taken for those before them
            self.process.kill()
            self.process.wait()
            raise ValueError("the process that tries grammars ended; the server's log may say why") from None
        return answer

    def _say(self, line: str) -> None:
        if self.process is None or self.process.stdin is None:
            return
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it ended: there will be no answer, either
            pass

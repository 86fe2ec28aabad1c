"""How long a server takes to serve again after SIGKILL under load, against a fresh start of the same server.

    python -m checks.restart --repeats 7 --out checks/results/restart.json

Each repetition starts a fresh server, loads it with endless streams, kills it in mid-answer, starts it again
on the same port, and asks both servers the same greedy question. Times run from the start of the process to
the first 200 of /ready, and to the end of the first answer. The machine's file cache is warm for both. Exit
code 1 when an answer differs.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.progress import track

from benchmarks.result_file import print_result
from benchmarks.server_process import PATIENCE, ServerProcess, server_process

MESSAGES = [{"role": "user", "content": "Solve for x: 3x + 4 = 19."}]
QUESTION: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 32, "temperature": 0}
ENDLESS = {"prompt": "one two three", "max_tokens": 1500, "ignore_eos": True, "stream": True}


@dataclass(frozen=True)
class Start:
    """Seconds from the start of the process to ready, and to the first answer; and that answer."""

    ready: float
    answered: float
    text: str


@dataclass(frozen=True)
class Repetition:
    """A fresh start, and the start after a kill with `running` answers in the making."""

    fresh: Start
    again: Start
    running: int


def ask(server: ServerProcess) -> Start:
    """The first answer of a server that has just become ready."""
    began = time.monotonic()
    answer = httpx.post(
        server.url + "/v1/chat/completions", json=QUESTION, timeout=PATIENCE, trust_env=False
    ).raise_for_status()
    text = answer.json()["choices"][0]["message"]["content"]
    return Start(server.ready_seconds, server.ready_seconds + time.monotonic() - began, text)


def kill_under_load(server: ServerProcess, streams: int) -> int:
    """SIGKILL while `streams` clients read; how many answers were in the making."""
    begun = threading.Barrier(streams + 1)

    def read() -> None:
        try:
            with httpx.stream(
                "POST", server.url + "/v1/completions", json=ENDLESS, timeout=PATIENCE, trust_env=False
            ) as response:
                lines = response.iter_lines()
                next(lines)
                begun.wait(PATIENCE)
                for _ in lines:
                    pass
        except httpx.TransportError:
            pass  # the server is gone: that is what this is about

    threads = [threading.Thread(target=read) for _ in range(streams)]
    for thread in threads:
        thread.start()
    begun.wait(PATIENCE)
    running = int(server.metric("num_requests_running"))
    server.process.kill()
    server.process.wait(PATIENCE)
    for thread in threads:
        thread.join(60)
    return running


def repeat(streams: int) -> Repetition:
    """One fresh start, kill and start again."""
    with server_process("--port", "0") as server:
        port, fresh = server.port, ask(server)
        running = kill_under_load(server, streams)
    with server_process("--port", str(port)) as server:
        return Repetition(fresh, ask(server), running)


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made = [repeat(options.streams) for _ in track(range(options.repeats), "repetitions")]
    ratios = [r.again.ready / r.fresh.ready for r in made]
    result = {
        "running_when_killed": [r.running for r in made],
        "fresh_ready_seconds": statistics.median(r.fresh.ready for r in made),
        "again_ready_seconds": statistics.median(r.again.ready for r in made),
        "fresh_answered_seconds": statistics.median(r.fresh.answered for r in made),
        "again_answered_seconds": statistics.median(r.again.answered for r in made),
        "again_over_fresh": statistics.median(ratios),
        "again_over_fresh_range": [min(ratios), max(ratios)],
        "same_answers": len({start.text for r in made for start in (r.fresh, r.again)}) == 1,
        "repetitions": [asdict(r) for r in made],
    }
    print_result(result, options.out)
    raise SystemExit(not result["same_answers"])


if __name__ == "__main__":
    main()

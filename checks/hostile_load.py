"""Thousands of mixed requests, a share of them hostile, against a real server: honest answers stay right, and
about as fast.

    python -m checks.hostile_load --requests 10000 --users 64 --hostile 0.05

Starts `draftkit serve` twice on 127.0.0.1: for a run without hostile requests, and for one with them. Honest
requests are greedy completions, chats, JSON answers and tokenising, whose right answers are known from a
quiet server; hostile ones are what docs/security.md lists: deep grammars, bodies at their caps, slow and
broken connections. Prints one line of JSON with both runs' latencies of honest requests; exit code 1 when an
honest answer was wrong, the server ended, or the ratio of the 99th percentiles is above `--most`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import AbstractContextManager, suppress
from typing import Any

import httpx
import numpy as np

from checks.full_fields import started

QUESTIONS = [
    "What is a list?",
    "Write a function that adds.",
    "Explain a for loop.",
    "What does len do?",
    "17 + 25 = ",
]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
}
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"


def honest() -> list[tuple[str, dict[str, Any]]]:
    """Requests whose answers do not depend on chance."""
    asked: list[tuple[str, dict[str, Any]]] = []
    for number, question in enumerate(QUESTIONS):
        greedy = {"temperature": 0, "max_tokens": 8 + 4 * number}
        message = [{"role": "user", "content": question}]
        form = {"type": "json_schema", "json_schema": {"schema": {**SCHEMA, "additionalProperties": False}}}
        asked += [
            (COMPLETION, {"prompt": question, **greedy}),
            (CHAT, {"messages": message, **greedy}),
            (CHAT, {"messages": message, "temperature": 0, "max_tokens": 24, "response_format": form}),
            ("/tokenize", {"messages": message}),
        ]
    return asked


def hostile(chance: random.Random) -> tuple[str, Any]:
    """One of the attacks; a list is raw bytes for a connection that is then left alone for a second."""
    chain = {
        f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}}
        for i in range(chance.randint(900, 1500))
    }
    rules = "start: a0\n" + "".join(f'a{i}: "x" a{i + 1}\n' for i in range(3000)) + 'a3000: "y"'
    props = {"properties": {f"p{i}": {"type": "integer"} for i in range(chance.randint(3000, 5000))}}
    attacks: list[tuple[str, Any]] = [
        (COMPLETION, {"prompt": "a", "structured_outputs": {"json": {"$defs": chain, "$ref": "#/$defs/a0"}}}),
        (COMPLETION, {"prompt": "a", "structured_outputs": {"grammar": rules}}),
        (COMPLETION, {"prompt": "a", "structured_outputs": {"json": props}}),
        (COMPLETION, {"prompt": "a", "n": 32, "bad_words": ["word " * 50_000]}),
        (COMPLETION, {"prompt": "a", "n": 24, "stop_token_ids": [5] * 300_000}),
        (COMPLETION, {"prompt": "word " * 1_000_000}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}] * 60_000}),
        (CHAT, {"messages": [{"role": "\x1b[2J", "content": "a"}]}),
        (COMPLETION, {"prompt": "a", "n": 64, "prompt_logprobs": 20, "max_tokens": 1}),
        (
            "",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
            b"application/json\r\nContent-Length: 99\r\n\r\n{",
        ),
        ("", b"GET /health HTTP/1.1\r\nHost: "),
        ("", b"\x00\xff" * 500),
    ]
    return chance.choice(attacks)


def serving() -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    """A server of the embedded target."""
    return started([sys.executable, "-m", "draftkit.cli", "serve", "--port", "0", "--max-running", "32"])


def said(path: str, body: Any) -> Any:
    """What counts of an answer."""
    if path == "/tokenize":
        return body["tokens"]
    choice = body["choices"][0]
    return choice.get("text") if path == COMPLETION else choice["message"]["content"]


async def drop(url: str, raw: bytes) -> None:
    """Connect, send, wait a second, leave."""
    host, port = url.removeprefix("http://").split(":")
    with suppress(OSError):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw)
        await asyncio.sleep(1)
        writer.close()


Run = tuple[list[float], Counter[str], list[Any]]


async def run(url: str, given: argparse.Namespace, share: float, right: list[Any] | None) -> Run:
    """Latencies of honest requests, what came back, and the answers to each honest request."""
    chance, asked = random.Random(given.seed), honest()
    answers: list[Any] = [None] * len(asked)
    latencies: list[float] = []
    outcomes: Counter[str] = Counter()
    plan = [(chance.random() < share, chance.randrange(len(asked))) for _ in range(given.requests)]
    if right is None:
        plan = [(False, i) for i in range(len(asked))]
    todo = iter(plan)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as http:

        async def user() -> None:
            for is_hostile, index in todo:
                if is_hostile:
                    path, body = hostile(chance)
                    if not path:
                        await drop(url, body)
                        continue
                    with suppress(httpx.HTTPError):
                        outcomes[f"hostile {(await http.post(path, json=body)).status_code}"] += 1
                    continue
                path, body = asked[index]
                began = time.perf_counter()
                answer = await http.post(path, json=body)
                while answer.status_code in (429, 503):
                    outcomes["asked again"] += 1
                    await asyncio.sleep(0.2)
                    answer = await http.post(path, json=body)
                latencies.append(time.perf_counter() - began)
                answers[index] = said(path, answer.json()) if answer.status_code == 200 else answer.text
                good = right is None or answers[index] == right[index]
                outcomes["right" if good else "wrong"] += 1

        await asyncio.gather(*(user() for _ in range(given.users if right is not None else 1)))
    return latencies, outcomes, answers


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--hostile", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=float, default=1.5)
    given = parser.parse_args()
    told: dict[str, Any] = {"requests": given.requests, "users": given.users}
    right: list[Any] = []
    ended = False
    for name, share in (("quiet", 0.0), ("hostile", given.hostile)):
        with serving() as (process, url):
            if not right:
                right = asyncio.run(run(url, given, 0.0, None))[2]
            latencies, outcomes, _ = asyncio.run(run(url, given, share, right))
            ended = ended or process.poll() is not None
        p50, p99 = (float(np.percentile(latencies, q)) for q in (50, 99))
        told[name] = {"outcomes": dict(outcomes), "p50_seconds": round(p50, 3), "p99_seconds": round(p99, 3)}
    told["p99_ratio"] = round(told["hostile"]["p99_seconds"] / told["quiet"]["p99_seconds"], 2)
    print(json.dumps(told))
    wrong = any(told[name]["outcomes"].get("wrong") for name in ("quiet", "hostile"))
    sys.exit(wrong or ended or told["p99_ratio"] > given.most)


if __name__ == "__main__":
    main()

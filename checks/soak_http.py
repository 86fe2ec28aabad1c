"""Thousands of requests through the real server process: random lengths and settings, clients that leave,
stop strings.

    python -m checks.soak_http --requests 10000 --concurrency 64 --out checks/results/soak_http.json

`soak.py` does the same with the engine alone. Here every answer comes over HTTP, whole or as a stream, from
both endpoints, with up to three choices. One client in nine leaves in mid-stream, one in nine before its
first token, one in thirty while it still sends its body; one request in thirty is wrong on purpose and must
get its 400. Greedy answers without further settings are compared with the reference loop's, in tokens and in
text; JSON answers are parsed. Exit code 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.progress import Progress

from benchmarks.result_file import print_result
from benchmarks.server_process import PATIENCE, ServerProcess, server_process
from checks.soak import ROUNDING, top_gap
from draftkit.data.conversations import read_conversations
from draftkit.decode import decode
from draftkit.ops.sampling import Sampling
from draftkit.stages import TINY_HELD_OUT
from draftkit.target.loading import load_target
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2, 3]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
WRONG: tuple[dict[str, Any], ...] = (
    {"top_p": 2},
    {"max_tokens": 10**6},
    {"stop_token_ids": [-1]},
    {"logit_bias": {"x": 1}},
)
# tokens of a prompt and its answer: the smallest memory for keys and values must hold one request
MAX_LENGTH = 256


@dataclass(frozen=True)
class Question:
    """A prompt in both of its forms, and the reference loop's greedy answer to it."""

    messages: list[dict[str, Any]]
    tokens: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One request. `leaves` is "", "sending", "waiting" or "reading"; `wrong` ones must be refused; `greedy`
    ones are compared, with `stop` as their only setting."""

    question: Question
    path: str
    body: dict[str, Any]
    leaves: str
    wrong: bool
    greedy: bool
    patience: float  # seconds of a client that leaves while waiting
    chunks: int  # that a client takes before it leaves while reading


@dataclass
class Answer:
    """What a client has of one choice."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None


@dataclass
class Report:
    """`errors` are answers that nobody asked for: other codes, broken bodies, exceptions. `wrong_ends` are
    answers that are too long or that ended without a reason; `megabytes` of the server at a tenth of the
    requests and at the end."""

    requests: int = 0
    answered: int = 0
    streamed: int = 0
    choices: int = 0
    tokens: int = 0
    left_sending: int = 0
    left_waiting: int = 0
    left_reading: int = 0
    refused_on_purpose: int = 0
    greedy_checked: int = 0
    greedy_with_stop: int = 0
    greedy_ties: int = 0
    greedy_wrong: int = 0
    json_checked: int = 0
    json_wrong: int = 0
    wrong_ends: int = 0
    errors: int = 0
    first_errors: list[str] = field(default_factory=list)
    tracebacks: int = 0
    preemptions: int = 0
    leaked_requests: int = 0
    leaked_blocks: int = 0
    megabytes_early: float = 0.0
    megabytes_end: float = 0.0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Nothing is wrong; memory may grow by a tenth (allocator)."""
        wrong = self.greedy_wrong + self.json_wrong + self.wrong_ends + self.errors + self.tracebacks
        leaked = self.leaked_requests + self.leaked_blocks
        return (
            not (wrong or leaked or self.megabytes_end > 1.1 * self.megabytes_early)
            and self.greedy_checked > 0
        )

    def error(self, what: str) -> None:
        """Count an error and keep the first few."""
        self.errors += 1
        if len(self.first_errors) < 5:
            self.first_errors.append(what[:300])


def read_questions(target: TransformersTarget, name: str, count: int, most: int) -> list[Question]:
    """Held-out prompts with their greedy answers of at most `most` tokens."""
    tokenizer, conversations = load_tokenizer(name), read_conversations([TINY_HELD_OUT])
    questions = []
    for conversation in conversations[:: max(1, len(conversations) // count)][:count]:
        messages = conversation.as_dicts()[:1]
        tokens = TemplateFormat(tokenizer).prompt(messages)
        questions.append(Question(messages, tokens, decode(target, None, tokens, Sampling(0.0), most).tokens))
    return questions


def random_case(source: random.Random, questions: Sequence[Question], tokenizer: Any, most: int) -> Case:
    """A third plain greedy, half of these with a stop string; the others mix what a client may set."""
    question, chat = source.choice(questions), source.random() < 0.5
    body: dict[str, Any] = {"messages": question.messages} if chat else {"prompt": list(question.tokens)}
    body |= {
        "max_tokens": source.randint(1, most),
        "stream": source.random() < 0.6,
        "n": source.choice([1, 1, 1, 2, 3]),
    }
    body |= {"return_token_ids": True, "draft": source.random() < 0.9}
    greedy = source.random() < 0.33
    wrong = not greedy and source.random() < 0.05
    if greedy:
        body["temperature"] = 0
        text = tokenizer.decode(question.answer, skip_special_tokens=True)
        if source.random() < 0.5 and len(text) > 8:
            at = source.randrange(len(text) - 4)
            body["stop"] = text[at : at + source.randint(1, 4)]
    else:
        body |= _random_settings(source, len(tokenizer), body["max_tokens"])
    if wrong:
        body |= source.choice(WRONG)
    leaves = "" if wrong else source.choices(["", "waiting", "reading", "sending"], [67, 11, 11, 3])[0]
    if leaves == "reading":
        body["stream"] = True
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return Case(question, path, body, leaves, wrong, greedy, source.uniform(0, 0.2), source.randint(1, 6))


def _random_settings(source: random.Random, vocab: int, limit: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "seed": source.randrange(2**40),
        "top_k": source.choice([1, 5, 50]),
        "top_p": source.choice([0.5, 0.9]),
        "min_p": source.choice([0.02, 0.2]),
        "presence_penalty": source.uniform(-2, 2),
        "frequency_penalty": source.uniform(-2, 2),
        "repetition_penalty": source.uniform(0.8, 1.5),
        "logit_bias": {str(source.randrange(vocab)): source.uniform(-5, 5) for _ in range(3)},
        "allowed_token_ids": source.sample(range(vocab), 20),
        "min_tokens": source.randint(0, limit),
        "stop_token_ids": source.sample(range(vocab), 3),
        "stop": [source.choice("etaoin "), source.choice(["def", "the", "\n"])],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "return_spec_stats": True,
        "bad_words": [source.choice(["the", "return", " a"]), "def f"],
    }
    chosen = {name: options[name] for name in options if source.random() < 0.15}
    chosen["temperature"] = source.choice([0.0, 0.3, 0.7, 1.0, 1.5])
    if source.random() < 0.1:
        return {"temperature": chosen["temperature"], "response_format": _json_format(), "max_tokens": 64}
    return chosen


def _json_format() -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA}}


class Soak:
    """One run; its clients share a source of cases and a report."""

    def __init__(
        self, server: ServerProcess, target: TransformersTarget, questions: Sequence[Question], most: int
    ) -> None:
        self.server, self.target, self.questions, self.most = server, target, questions, most
        self.tokenizer, self.source, self.report = (
            load_tokenizer(target.info.name),
            random.Random(0),
            Report(),
        )

    def run(self, requests: int, concurrency: int) -> Report:
        """Keep `concurrency` clients busy until `requests` have had their end."""
        began, report = time.perf_counter(), self.report
        asyncio.run(self._clients(requests, concurrency))
        report.seconds = time.perf_counter() - began
        if not self.server.wait_until_idle():
            running, waiting = (
                self.server.metric(f"num_requests_{state}") for state in ("running", "waiting")
            )
            report.leaked_requests = int(running + waiting)
        report.leaked_blocks = int(self.server.metric("kv_blocks_used"))
        report.preemptions = int(self.server.metric("num_preemptions_total"))
        report.megabytes_end = self.server.megabytes
        report.tracebacks = sum("Traceback" in line for line in self.server.log)
        return report

    async def _clients(self, requests: int, concurrency: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        options: dict[str, Any] = {
            "base_url": self.server.url,
            "timeout": PATIENCE,
            "trust_env": False,
            "limits": limits,
        }
        with Progress() as progress:
            bar = progress.add_task("requests", total=requests)
            async with httpx.AsyncClient(**options) as http, asyncio.TaskGroup() as group:

                async def client() -> None:
                    while self.report.requests < requests:
                        self.report.requests += 1
                        if self.report.requests == max(requests // 10, 1):
                            self.report.megabytes_early = self.server.megabytes
                        case = random_case(self.source, self.questions, self.tokenizer, self.most)
                        try:
                            await self._ask(http, case)
                        except (httpx.HTTPError, ValueError, KeyError) as error:
                            self.report.error(f"{case.path} {case.body}: {error!r}")
                        progress.advance(bar)

                for _ in range(concurrency):
                    group.create_task(client())

    async def _ask(self, http: httpx.AsyncClient, case: Case) -> None:
        report = self.report
        if case.leaves == "sending":
            try:
                await http.post(
                    case.path, content=_half(case.body), headers={"content-type": "application/json"}
                )
            except _Leaves:
                report.left_sending += 1
        elif case.leaves == "waiting":
            try:
                async with asyncio.timeout(case.patience):
                    self._check(case, await self._answers(http, case, None))
            except TimeoutError:
                report.left_waiting += 1
        elif case.leaves == "reading":
            answers = await self._answers(http, case, case.chunks)
            if any(answer.reason is None for answer in answers):
                report.left_reading += 1
            else:
                self._check(case, answers)
        else:
            self._check(case, await self._answers(http, case, None))

    async def _answers(self, http: httpx.AsyncClient, case: Case, chunks: int | None) -> list[Answer]:
        """The choices of a response, or what came of them before the client left; none for a refusal."""
        answers = [Answer() for _ in range(case.body["n"])]
        async with http.stream("POST", case.path, json=case.body) as response:
            if case.wrong or response.status_code != 200:
                raw = await response.aread()
                if case.wrong and response.status_code == 400 and json.loads(raw)["error"]["message"]:
                    self.report.refused_on_purpose += 1
                else:
                    self.report.error(f"{response.status_code} {raw[:200]!r} for {case.body}")
                return []
            if not case.body["stream"]:
                whole = json.loads(await response.aread())
                _take(answers, whole["choices"])
                made = sum(len(answer.tokens) for answer in answers)
                if whole["usage"]["completion_tokens"] != made:
                    self.report.error(f"usage {whole['usage']} for {made} tokens")
                return answers
            self.report.streamed += 1
            ended, seen = False, 0
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    _take(answers, json.loads(line[6:])["choices"])
                    seen += 1
                    if chunks is not None and seen >= chunks:
                        return answers
            if not ended:
                self.report.error(f"a stream without its end for {case.body}")
        return answers

    def _check(self, case: Case, answers: list[Answer]) -> None:
        report, body = self.report, case.body
        if not answers:
            return
        report.answered += 1
        for answer in answers:
            report.choices += 1
            report.tokens += len(answer.tokens)
            full = len(answer.tokens) == body["max_tokens"]
            too_long = len(answer.tokens) > body["max_tokens"]
            report.wrong_ends += (
                too_long
                or answer.reason not in ("stop", "length")
                or (answer.reason == "length" and not full)
            )
            if case.greedy:
                self._check_greedy(case, answer)
            if "response_format" in body and answer.reason == "stop":  # else the limit cut it
                report.json_checked += 1
                report.json_wrong += not _is_pair(answer.text)

    def _check_greedy(self, case: Case, answer: Answer) -> None:
        report, body, stop = self.report, case.body, case.body.get("stop")
        report.greedy_checked += 1
        tokens = list(case.question.answer[: body["max_tokens"]])
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if stop is not None and stop in text:
            report.greedy_with_stop += 1
            right = answer.text == text[: text.index(stop)] and answer.reason == "stop"
            if right and answer.tokens == tokens[: len(answer.tokens)]:
                return
        elif answer.tokens == tokens and answer.text == text:
            return
        place = next((i for i, (a, b) in enumerate(zip(answer.tokens, tokens, strict=False)) if a != b), None)
        tie = place is not None and top_gap(self.target, [*case.question.tokens, *tokens[:place]]) < ROUNDING
        report.greedy_ties += tie
        report.greedy_wrong += not tie


class _Leaves(Exception):
    """The client goes away while it sends."""


async def _half(body: dict[str, Any]) -> AsyncIterator[bytes]:
    raw = json.dumps(body).encode()
    yield raw[: len(raw) // 2]
    raise _Leaves


def _take(answers: list[Answer], choices: list[dict[str, Any]]) -> None:
    """Add the choices of a response or of a chunk; all three shapes have token_ids."""
    for choice in choices:
        answer = answers[choice["index"]]
        answer.tokens += choice.get("token_ids", [])
        message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
        answer.text += message.get("content") or ""
        answer.reason = choice.get("finish_reason") or answer.reason


def _is_pair(text: str) -> bool:
    try:
        said = json.loads(text)
    except ValueError:
        return False
    return set(said) == {"a", "b"} and said["a"] in (1, 2, 3) and isinstance(said["b"], bool)


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=40, help="at most, per choice")
    parser.add_argument("--kv-megabytes", type=int, default=24, help="for keys and values")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = load_target(options.target)
    questions = read_questions(target, options.target, 64, options.new_tokens)
    memory = ("--kv-gib", str(options.kv_megabytes / 1024), "--max-length", str(MAX_LENGTH))
    with server_process("--target", options.target, "--port", "0", *memory) as server:
        report = Soak(server, target, questions, options.new_tokens).run(
            options.requests, options.concurrency
        )
    settings = {
        "concurrency": options.concurrency,
        "new_tokens": options.new_tokens,
        "kv_megabytes": options.kv_megabytes,
    }
    result = {**settings, "good": report.good, **asdict(report)}
    print_result(result, options.out)
    raise SystemExit(not report.good)


if __name__ == "__main__":
    main()

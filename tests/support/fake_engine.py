"""A stand-in for the engine that follows its seam: tokens are a function of prompt and seed, time is a sleep.

`python tests/support/fake_engine.py --port 0 ...` is a server process over it, for tests of the server alone.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from draftkit.engine import outputs as seam
from draftkit.errors import DraftkitError

ASSET = Path(__file__).parents[2] / "draftkit" / "assets" / "tiny"
GAMMA = 4
MAX_LENGTH = 512


@dataclass(frozen=True)
class Info:
    name: str = "fake"
    max_length: int = MAX_LENGTH
    vocab_size: int = 4096
    gamma: int = GAMMA
    kv_blocks_total: int = 100
    max_running: int = 64


@dataclass(frozen=True)
class Metrics:
    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_total: int = 100
    prefix_hits: int = 0
    prefix_queries: int = 0
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    wasted: int = 0
    accepted_per_position: tuple[int, ...] = (0,) * GAMMA
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0
    preemptions: int = 0
    calibration_error: float | None = 0.05
    gate: Any = None


@dataclass
class Running:
    prompt: list[int]
    params: Any
    script: list[int]
    made: list[int] = field(default_factory=list)
    stats: Any = None


class FakeEngine:
    """Says `script` (token ids, then `eos`) to everybody; every round accepts two of four drafts."""

    def __init__(
        self, script: list[int], eos: int, step_seconds: float = 0.0, hold: Path | None = None
    ) -> None:
        self.script, self.eos, self.step_seconds, self.hold = script, eos, step_seconds, hold
        self.info = Info()
        self.counts = Metrics()
        self.requests: dict[str, Running] = {}
        self.aborted: list[str] = []

    @property
    def metrics(self) -> Metrics:
        return replace(self.counts, running=len(self.requests))

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: Any) -> None:
        if request_id in self.requests:
            raise DraftkitError(f"request {request_id} is there already")
        if params.seed == 666:
            raise DraftkitError("seed 666 is refused")
        shift = (params.seed or 0) % max(1, len(self.script)) if params.temperature else 0
        script = self.script[shift:] + self.script[:shift]
        self.requests[request_id] = Running(list(prompt_token_ids), params, script)

    def abort(self, request_id: str) -> None:
        self.requests.pop(request_id, None)
        self.aborted.append(request_id)

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        time.sleep(self.step_seconds)
        if self.hold is not None and self.hold.exists():
            time.sleep(0.002)
            return []
        return [self._round(name, r) for name, r in list(self.requests.items())]

    def _round(self, name: str, running: Running) -> Any:
        params, first = running.params, not running.made
        if params.seed == 13:
            raise RuntimeError("seed 13 breaks the engine")
        drafting = params.draft and not first
        tokens, reason, why = [], None, None
        for _ in range(3 if drafting else 1):
            at = len(running.made)
            ended = at >= len(running.script) and not params.ignore_eos
            token = self.eos if ended else running.script[at % len(running.script)]
            running.made.append(token)
            tokens.append(token)
            if ended or (token in params.stop_token_ids and at + 1 > params.min_tokens):
                reason, why = "stop", None if ended else token
            elif len(running.made) >= params.max_tokens:
                reason = "length"
            if reason:
                break
        top = params.logprobs
        events = tuple(
            seam.TokenEvent(
                t,
                "accepted" if drafting and i < 2 else "target",
                None if top is None else -0.5,
                tuple((t + k, -0.5 - k) for k in range(top or 0)),
            )
            for i, t in enumerate(tokens)
        )
        old = running.stats or seam.RequestStats(
            prompt_tokens=len(running.prompt),
            cached_tokens=0,
            output_tokens=0,
            rounds=0,
            drafted=0,
            verified=0,
            accepted=0,
            accepted_per_position=(0,) * GAMMA,
            queue_seconds=0.0,
            prefill_seconds=0.0,
            decode_seconds=0.0,
        )
        took = sum(e.origin == "accepted" for e in events)
        per = tuple(n + (i < took) for i, n in enumerate(old.accepted_per_position))
        seconds = 0.0 if first else old.decode_seconds + self.step_seconds
        running.stats = replace(old, output_tokens=len(running.made), decode_seconds=seconds)
        if drafting:
            running.stats = replace(
                running.stats,
                rounds=old.rounds + 1,
                drafted=old.drafted + GAMMA,
                verified=old.verified + 3,
                accepted=old.accepted + took,
                accepted_per_position=per,
            )
            m = self.counts
            self.counts = replace(
                m,
                rounds=m.rounds + 1,
                drafted=m.drafted + GAMMA,
                verified=m.verified + 3,
                accepted=m.accepted + took,
                wasted=m.wasted + 3 - took,
                accepted_per_position=tuple(n + (i < took) for i, n in enumerate(m.accepted_per_position)),
            )
        if reason:
            del self.requests[name]
        prompt = None
        if first and params.prompt_logprobs is not None:
            best = tuple((k, -0.5 - k) for k in range(params.prompt_logprobs))
            prompt = tuple(seam.PromptToken(t, -1.5, 9, best) for t in running.prompt[1:])
        return seam.StepOutput(
            name, events, (7,) if drafting else (), reason, why, running.stats, prompt, reason == "stop"
        )


TEXT = "The quick brown fox – naïve, 日本 – jumps over the lazy dog. " * 3


def fake_served(
    step_seconds: float = 0.0,
    text: str = TEXT,
    max_running: int = 64,
    name: str = "fake",
    special: bool = False,
    template: str | None = None,
    marks: Sequence[str] = (),
    switches: Mapping[str, Any] | None = None,
    max_length: int = MAX_LENGTH,
    hold: Path | None = None,
) -> Any:
    """A `Served` over the embedded target's tokenizer, with another template and further special tokens.
    While the file `hold` is there, no answer goes on."""
    from transformers import AutoTokenizer

    from draftkit.serve.detokenize import TokenTexts
    from draftkit.serve.worker import Served

    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.chat_template = template or tokenizer.chat_template
    engine = FakeEngine(
        tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, step_seconds, hold
    )
    engine.info = replace(
        engine.info, vocab_size=len(tokenizer), max_running=max_running, max_length=max_length
    )
    texts = TokenTexts(tokenizer)
    return Served(
        engine, tokenizer, texts, name, honour_special_tokens=special, template_switches=switches or {}
    )


def main() -> None:
    from draftkit.errors import ServeError
    from draftkit.serve.server import run_server
    from draftkit.serve.settings import ServeSettings

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--name", default="fake")
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH)
    parser.add_argument("--hold", type=Path)
    parser.add_argument("--constant", action="append", default=[], help="package.module.NAME=number")
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--max-waiting", type=int, default=512)
    parser.add_argument("--drain-seconds", type=float, default=120)
    parser.add_argument("--max-body-bytes", type=int, default=2**20)
    parser.add_argument("--max-connections", type=int, default=4096)
    parser.add_argument("--allow-origin", action="append", default=[])
    parser.add_argument("--honour-special-tokens", action="store_true")
    given = parser.parse_args()
    for constant in given.constant:
        place, _, value = constant.partition("=")
        module, _, name = place.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), int | float)
        setattr(sys.modules[module], name, float(value))
    settings = ServeSettings(
        port=given.port,
        api_keys=tuple(given.api_key),
        max_waiting=given.max_waiting,
        max_body_bytes=given.max_body_bytes,
        drain_seconds=given.drain_seconds,
        max_connections=given.max_connections,
        allow_origins=tuple(given.allow_origin),
    )

    def served() -> Any:
        return fake_served(
            given.step_seconds,
            given.text,
            given.max_running,
            given.name,
            given.honour_special_tokens,
            max_length=given.max_length,
            hold=given.hold,
        )

    try:
        run_server(served, settings)
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

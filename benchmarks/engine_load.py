"""What the engine benchmarks share: prompts of the embedded target, and a closed loop of greedy requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from draftkit.data.conversations import Conversation, read_conversations
from draftkit.engine.engine import Engine
from draftkit.engine.sampling_params import SamplingParams
from draftkit.stages import TINY_HELD_OUT
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Load:
    """One run: tokens made, seconds of the whole (see `clock`), of the drafter's and the target's passes;
    tokens per round."""

    tokens: int
    seconds: float
    draft_seconds: float
    verify_seconds: float
    other_seconds: float
    rounds: int
    accepted_length: float
    verified_per_round: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def overhead(self) -> float:
        """Share of the steps' time outside both models' passes."""
        return self.other_seconds / (self.draft_seconds + self.verify_seconds + self.other_seconds)


def clock() -> float:
    """Seconds: of the processor when torch has one thread, which other processes disturb less; else of the
    wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def read_prompts(target: str, count: int, paths: Sequence[Path] | None = None) -> list[tuple[int, ...]]:
    """Token ids of about `count` prompts, by default embedded held-out ones, one of each domain in turn: a
    benchmark may take only the first few."""
    tokenizer = load_tokenizer(target)
    by_domain: dict[str, list[Conversation]] = {}
    for conversation in read_conversations(paths or [TINY_HELD_OUT]):
        by_domain.setdefault(conversation.domain, []).append(conversation)
    each = -(-count // len(by_domain))
    chosen = (found[:: max(1, len(found) // each)][:each] for found in by_domain.values())
    turns = [c for turn in zip(*chosen, strict=False) for c in turn]
    return [TemplateFormat(tokenizer).prompt(c.as_dicts()[:1]) for c in turns[:count]]


def answer_at_once(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of at most `new_tokens` tokens to prompts that are asked at the same time, token ids, in
    their order."""
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(answers, prompts, strict=True):
        engine.add_request(name, list(prompt), SamplingParams(max_tokens=new_tokens, temperature=0.0))
    while engine.has_work():
        for output in engine.step():
            answers[output.request_id] += [event.token_id for event in output.events]
    return list(answers.values())


def run_closed(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    concurrency: int,
    requests: int,
    new_tokens: int,
    ignore_eos: bool = True,
) -> Load:
    """`concurrency` users ask `requests` questions in all, each the next one when it has its answer of
    `new_tokens` tokens, or fewer where the target ends it and `ignore_eos` is off. Prefixes are cold only as
    far as the prompts differ."""
    made, asked, before = 0, 0, engine.metrics
    settings = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=ignore_eos)
    began = clock()
    running = 0
    while asked < requests or running:
        while running < concurrency and asked < requests:
            engine.add_request(f"load-{asked}", prompts[asked % len(prompts)], settings)
            asked, running = asked + 1, running + 1
        for output in engine.step():
            made += len(output.events)
            running -= output.finish_reason is not None
    seconds, after = clock() - began, engine.metrics
    rounds = max(after.rounds - before.rounds, 1)
    return Load(
        made,
        seconds,
        after.draft_seconds - before.draft_seconds,
        after.verify_seconds - before.verify_seconds,
        after.other_seconds - before.other_seconds,
        after.rounds - before.rounds,
        1 + (after.accepted - before.accepted) / rounds,
        (after.verified - before.verified) / rounds,
    )

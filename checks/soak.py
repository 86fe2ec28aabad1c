"""Thousands of requests with random lengths, settings and aborts through one engine: errors, leaks, memory,
answers.

    python -m checks.soak DRAFTER --requests 10000 --concurrency 64 --out checks/results/soak.json

Greedy answers without further settings are compared with the reference loop's (`draftkit.decode`, without a
drafter); a difference where the two largest logits are closer than rounding is counted apart. Log
probabilities of prompts are compared with the Transformers module's. Exit code 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import Progress

from benchmarks.engine_load import read_prompts
from benchmarks.result_file import print_result
from draftkit.decode import decode
from draftkit.engine.engine import Engine
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.ops.sampling import Sampling
from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget

ROUNDING = 1e-3  # two logits closer than this may change places between two float32 summations


@dataclass
class Report:
    """`wrong_ends` are answers that are too long, or ended without a reason; `megabytes` at a tenth and at
    the end."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    tokens: int = 0
    greedy_checked: int = 0
    greedy_ties: int = 0
    greedy_wrong: int = 0
    wrong_ends: int = 0
    prompts_scored: int = 0
    prompts_wrong: int = 0
    preemptions: int = 0
    leaked_blocks: int = 0
    megabytes_early: float = 0.0
    megabytes_end: float = 0.0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Nothing is wrong; memory may grow by a tenth (allocator)."""
        grew = self.megabytes_end > 1.1 * self.megabytes_early
        wrong = self.greedy_wrong or self.wrong_ends or self.prompts_wrong or self.leaked_blocks or grew
        return not wrong and self.greedy_checked > 0 and self.prompts_scored > 0


def random_params(source: random.Random, vocab: int, most: int) -> SamplingParams:
    """A third plain greedy; the others mix what a client may set."""
    given: dict[str, Any] = {"max_tokens": source.randint(1, most), "draft": source.random() < 0.9}
    if source.random() < 0.33:
        return SamplingParams(temperature=0, **given)
    given["temperature"] = source.choice([0.0, 0.3, 0.7, 1.0, 1.5])
    options: dict[str, Any] = {
        "seed": source.randrange(2**40),
        "top_k": source.choice([1, 5, 50]),
        "top_p": source.choice([0.5, 0.9]),
        "min_p": source.choice([0.02, 0.2]),
        "presence_penalty": source.uniform(-2, 2),
        "frequency_penalty": source.uniform(-2, 2),
        "repetition_penalty": source.uniform(0.8, 1.5),
        "logit_bias": {source.randrange(vocab): source.uniform(-5, 5) for _ in range(3)},
        "allowed_token_ids": tuple(source.sample(range(vocab), 20)),
        "min_tokens": source.randint(0, given["max_tokens"]),
        "stop_token_ids": tuple(source.sample(range(vocab), 3)),
        "ignore_eos": True,
        "logprobs": source.randint(0, 3),
        "prompt_logprobs": source.randint(0, 3),
        "bad_token_ids": tuple(tuple(source.sample(range(vocab), source.randint(1, 2))) for _ in range(3)),
    }
    chosen = [name for name in options if source.random() < 0.15]
    return SamplingParams(**given, **{name: options[name] for name in chosen})


def soak(
    engine: Engine,
    target: TransformersTarget,
    prompts: Sequence[Sequence[int]],
    requests: int,
    concurrency: int,
    most: int,
    seed: int = 0,
) -> Report:
    """Keep `concurrency` requests in the engine until all have had their end; one in twelve is meant to be
    aborted early."""
    source, report = random.Random(seed), Report(requests)
    reference = [decode(target, None, p, Sampling(0.0), most).tokens for p in prompts]
    scores = [log_probs_of(target, p) for p in prompts]
    live: dict[str, tuple[int, SamplingParams, list[int]]] = {}
    doomed: dict[str, int] = {}
    began, asked, process = time.perf_counter(), 0, psutil.Process()
    with Progress() as progress:
        bar = progress.add_task("requests", total=requests)
        while asked < requests or live:
            while len(live) < concurrency and asked < requests:
                which, params = (
                    source.randrange(len(prompts)),
                    random_params(source, engine.info.vocab_size, most),
                )
                engine.add_request(str(asked), prompts[which], params)
                live[str(asked)] = (which, params, [])
                if source.random() < 1 / 12:
                    doomed[str(asked)] = source.randrange(8)  # steps that it may live
                asked += 1
                if asked == max(requests // 10, 1):
                    report.megabytes_early = process.memory_info().rss / 2**20
            for output in engine.step():
                which, params, tokens = live[output.request_id]
                tokens += [e.token_id for e in output.events]
                report.tokens += len(output.events)
                if output.prompt is not None:
                    report.prompts_scored += 1
                    told = torch.tensor([token.logprob for token in output.prompt])
                    report.prompts_wrong += not torch.allclose(told, scores[which], atol=ROUNDING, rtol=0)
                if output.finish_reason is not None:
                    del live[output.request_id]
                    report.finished += 1
                    _check(
                        report, target, prompts[which], reference[which], params, tokens, output.finish_reason
                    )
            doomed = {name: steps - 1 for name, steps in doomed.items() if name in live}
            for name in [n for n, steps in doomed.items() if steps < 0]:
                engine.abort(name)
                del live[name], doomed[name]
                report.aborted += 1
            progress.update(bar, completed=report.finished + report.aborted)
    report.seconds = time.perf_counter() - began
    report.leaked_blocks, report.preemptions = engine.metrics.kv_used, engine.metrics.preemptions
    report.megabytes_end = process.memory_info().rss / 2**20
    return report


def _check(
    report: Report,
    target: TransformersTarget,
    prompt: Sequence[int],
    reference: Sequence[int],
    params: SamplingParams,
    tokens: list[int],
    reason: str,
) -> None:
    limit = params.max_tokens or 0
    report.wrong_ends += (
        len(tokens) > limit or (reason == "length" and len(tokens) != limit) or reason == "abort"
    )
    if params != SamplingParams(temperature=0, max_tokens=limit, draft=params.draft):
        return
    report.greedy_checked += 1
    wanted = list(reference[:limit])
    if tokens != wanted:
        place = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), None)
        tie = place is not None and top_gap(target, [*prompt, *wanted[:place]]) < ROUNDING
        report.greedy_ties += tie
        report.greedy_wrong += not tie


def log_probs_of(target: TransformersTarget, tokens: Sequence[int]) -> torch.Tensor:
    """Of the tokens from the second on, each given those before it, [T - 1]."""
    read = target.forward(torch.tensor([list(tokens)]), None)
    found_TV = torch.log_softmax(target.logits(read.last_hidden_BTH[0]).float(), -1)
    return found_TV[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)


def top_gap(target: TransformersTarget, tokens: list[int]) -> float:
    """The two largest logits after `tokens`: their difference."""
    read = target.forward(torch.tensor([tokens]), None)
    first, second = target.logits(read.last_hidden_BTH[0, -1]).topk(2).values.tolist()
    return float(first - second)


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48, help="at most, per answer")
    parser.add_argument("--kv-megabytes", type=int, default=96, help="small enough for preemptions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = load_target(options.target)
    prompts = read_prompts(options.target, 64)
    settings = EngineSettings(max_running=options.concurrency, kv_bytes=options.kv_megabytes * 2**20)
    engine = Engine(target, str(options.drafter), settings)
    report = soak(engine, target, prompts, options.requests, options.concurrency, options.new_tokens)
    result = {"concurrency": options.concurrency, "good": report.good, **asdict(report)}
    print_result(result, options.out)
    raise SystemExit(not report.good)


if __name__ == "__main__":
    main()

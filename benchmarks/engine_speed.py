"""Tokens per second, greedy: transformers.generate, the engine without and with a drafter, and other servers,
in one run.

    python -m benchmarks.engine_speed --concurrency 1 2 4 8 16 --out result.json
    python -m benchmarks.engine_speed --drafter ... --against vllm=http://127.0.0.1:8001/v1

Every round runs all arms one after the other on the same prompts; a ratio is the median over rounds of two
arms' speeds in the same round, and an overall one is that of all tokens over all seconds (prompts of three
domains take turns, and a drafter is not worth the same in each). Answers end at the stop token. The engine
runs in this process, other servers answer over HTTP (`/v1/completions`, prompts as token ids, no streaming):
that costs them a few milliseconds per request. On a machine that others use, `--processor-time --threads 1`
counts this process's processor seconds instead of the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from rich.progress import Progress

from benchmarks.engine_load import answer_at_once
from benchmarks.measured_pair import add_pair_options, open_measured_pair
from benchmarks.result_file import print_result
from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.evaluate.run import device_name
from draftkit.target.transformers import TransformersTarget

Prompt = list[int]
# answers to prompts asked at once: tokens, or only how many
Arm = Callable[[Sequence[Prompt]], list[list[int] | int]]


@dataclass(frozen=True)
class Run:
    """One arm in one round: seconds and tokens of answers."""

    seconds: float
    tokens: int

    @property
    def speed(self) -> float:
        """Tokens per second of all requests together."""
        return self.tokens / self.seconds


def generate_arm(target: TransformersTarget, new_tokens: int) -> Arm:
    """`transformers.generate`, one prompt after the other."""

    def run(prompts: Sequence[Prompt]) -> list[list[int] | int]:
        found: list[list[int] | int] = []
        for prompt in prompts:
            there = torch.tensor([prompt], device=target.model.device)
            out = target.model.generate(there, max_new_tokens=new_tokens, do_sample=False)
            found.append(out[0, len(prompt) :].tolist())
        return found

    return run


def engine_arm(engine: Engine, new_tokens: int) -> Arm:
    """All prompts at once through the engine."""
    return lambda prompts: [*answer_at_once(engine, prompts, new_tokens)]


def server_arm(url: str, new_tokens: int, setting: Mapping[str, float] = {"temperature": 0.0}) -> Arm:
    """All prompts at once to an OpenAI-compatible server, as token ids, with these fields of sampling."""
    client = httpx.Client(base_url=url, timeout=300)
    model = client.get("models").raise_for_status().json()["data"][0]["id"]

    def ask(prompt: Prompt) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, **setting}
        return int(
            client.post("completions", json=body).raise_for_status().json()["usage"]["completion_tokens"]
        )

    def run(prompts: Sequence[Prompt]) -> list[list[int] | int]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))

    return run


def compare(
    arms: dict[str, Arm], prompts: list[Prompt], concurrency: int, rounds: int, clock: Callable[[], float]
) -> dict[str, object]:
    """Speeds and ratios at one concurrency; greedy answers of in-process arms must be those of the first
    one."""
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    different = dict.fromkeys(arms, 0)
    with Progress() as progress:
        task = progress.add_task(f"concurrency {concurrency}", total=(rounds + 1) * len(arms))
        for number in range(rounds + 1):
            batch = [prompts[(number * concurrency + i) % len(prompts)] for i in range(concurrency)]
            first: list[list[int] | int] | None = None
            for name, arm in arms.items():
                began = clock()
                answers = arm(batch)
                seconds = clock() - began
                first = first or answers
                different[name] += sum(
                    isinstance(a, list) and a != b for a, b in zip(answers, first, strict=True)
                )
                if number:  # the first round warms up
                    runs[name].append(Run(seconds, sum(a if isinstance(a, int) else len(a) for a in answers)))
                progress.advance(task)
    overall = {
        name: sum(r.tokens for r in found) / sum(r.seconds for r in found) for name, found in runs.items()
    }
    pairs = [(a, b) for i, a in enumerate(arms) for b in list(arms)[:i]]
    return {
        "concurrency": concurrency,
        "rounds": rounds,
        "overall_ratios": {f"{a} / {b}": round(overall[a] / overall[b], 3) for a, b in pairs},
        "tokens_per_second": {name: spread([run.speed for run in found]) for name, found in runs.items()},
        "answers_unlike_the_first_arm": different,
        "ratios": {
            f"{a} / {b}": spread([x.speed / y.speed for x, y in zip(runs[a], runs[b], strict=True)])
            for a, b in pairs
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_pair_options(parser)
    parser.add_argument("--plan", choices=["planned", "fixed"], default="planned")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--against", metavar="NAME=URL", nargs="*", default=[], help="other servers, URL with /v1"
    )
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--no-generate", action="store_true", help="leave transformers.generate out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.processor_time and options.against:
        parser.error("--processor-time counts this process alone; leave --against out")
    torch.set_num_threads(options.threads)
    pair = open_measured_pair(options, 66)
    target, drafter, prompts = pair.target, pair.drafter, [list(prompt) for prompt in pair.prompts]
    room = EngineSettings(plan=options.plan, kv_bytes=2**32 if target.device.type == "cuda" else 2**30)
    engines = {"engine": Engine(target, None, room)}
    if drafter is not None:
        engines["engine with drafter"] = Engine(target, drafter, room)
    arms = {} if options.no_generate else {"transformers": generate_arm(target, options.new_tokens)}
    arms |= {name: engine_arm(engine, options.new_tokens) for name, engine in engines.items()}
    for other in options.against:
        name, url = other.split("=", 1)
        arms[name] = server_arm(url, options.new_tokens)
    compiled = {name: engine.compiled for name, engine in engines.items()}
    clock = time.process_time if options.processor_time else time.perf_counter
    found = [
        compare(arms, prompts, concurrency, options.rounds, clock) for concurrency in options.concurrency
    ]
    facts = {
        "device": device_name(target.device),
        "torch": torch.__version__,
        "threads": options.threads,
        "compiled": compiled,
    }
    facts["clock"] = "processor" if options.processor_time else "wall"
    settings = {
        "target": target.info.name,
        "dtype": str(target.head_weight().dtype)[6:],
        "new_tokens": options.new_tokens,
    }
    settings |= {"plan": options.plan, "prompts": len(prompts)}
    if drafter is not None:
        metrics = engines["engine with drafter"].metrics
        settings["accepted_len"] = round(1 + metrics.accepted / max(1, metrics.rounds), 3)
        total = metrics.draft_seconds + metrics.verify_seconds + metrics.other_seconds
        settings["share_of_other"] = round(metrics.other_seconds / total, 3)
    print_result(facts | settings | {"results": found}, options.out)


if __name__ == "__main__":
    main()

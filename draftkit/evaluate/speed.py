"""The speed of serving: the engine with the drafter and without it, one request at a time, on the same
prompts in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from draftkit.draft.drafter import Drafter
from draftkit.engine.answers import sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.evaluate.metrics import BOOTSTRAP_SAMPLES, Floats
from draftkit.ops.sampling import Sampling
from draftkit.target.transformers import TransformersTarget

# prompts that both engines answer before anything is measured: code is loaded, the planner has tried both
# ways
WARM_UP = 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second with the drafter over those without, all tokens over all seconds, with the 95 %
    interval of a bootstrap over prompts. `drafting` is the share of steps in which the planner let the
    drafter propose."""

    prompts: int
    ratio: float
    low: float
    high: float
    plain_tokens_per_second: float
    drafted_tokens_per_second: float
    drafting: float


def measure_speed(
    target: TransformersTarget,
    drafter: Drafter,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    sampling: Sampling,
    max_new_tokens: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Speed]:
    """Speeds by domain, and "all"; `prompts` are token ids by domain. Lengths are planned, as in serving:
    answers have no seed, since seeded ones draft at every step.

    Both engines are warm before the first measured answer and take turns, each answer timed from the prompt
    to its end. `tick` is called after every prompt. Empty without prompts.
    """
    asked = [(domain, tokens) for domain, chosen in prompts.items() for tokens in chosen]
    if not asked:
        return {}
    room = EngineSettings(max_running=1, prefix_reuse=False)
    engines = [Engine(target, None, room), Engine(target, drafter, room)]
    for _, tokens in asked[:: max(1, len(asked) // WARM_UP)]:
        for engine in engines:
            _answer(engine, tokens, sampling, max_new_tokens)
    found: dict[str, list[list[float]]] = {}
    for index, (domain, tokens) in enumerate(asked):
        row: list[list[float]] = [[], []]
        for which in (0, 1) if index % 2 else (1, 0):  # so that each comes as often after the other
            row[which] = _answer(engines[which], tokens, sampling, max_new_tokens)
        found.setdefault(domain, []).append(row[0] + row[1])
        tick()
    every = [row for rows in found.values() for row in rows]
    return {domain: _speed(rows) for domain, rows in found.items()} | {"all": _speed(every)}


def _answer(engine: Engine, prompt: Sequence[int], sampling: Sampling, limit: int) -> list[float]:
    """Tokens of one answer, its seconds, rounds that could have drafted, and how many did."""
    before, tokens = engine.metrics, 0
    began = time.perf_counter()
    engine.add_request("speed", prompt, sampling_params(sampling, limit, None))
    while engine.has_work():
        tokens += sum(len(output.events) for output in engine.step())
    seconds, after = time.perf_counter() - began, engine.metrics
    drafts = (after.drafted - before.drafted) / max(1, engine.info.gamma)
    return [tokens, seconds, after.rounds - before.rounds, drafts]


def _speed(rows: list[list[float]]) -> Speed:
    """From rows of (tokens, seconds, rounds, drafts) without the drafter, then with it."""
    of_PA = np.array(rows)

    def rates(total_A: Floats) -> tuple[float, float]:
        return float(total_A[0] / total_A[1]), float(total_A[4] / total_A[5])

    plain, drafted = rates(of_PA.sum(0))
    rng = np.random.default_rng(0)
    drawn = [rates(of_PA[p].sum(0)) for p in rng.integers(0, len(rows), (BOOTSTRAP_SAMPLES, len(rows)))]
    low, high = np.percentile([with_it / without for without, with_it in drawn], [2.5, 97.5])
    total_A = of_PA.sum(0)
    share = float(total_A[7] / total_A[6]) if total_A[6] else 0.0
    return Speed(len(rows), drafted / plain, float(low), float(high), plain, drafted, share)

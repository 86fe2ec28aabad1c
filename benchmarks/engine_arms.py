r"""The engine without a drafter, with proposals of fixed length, and with planned lengths, at several
concurrencies.

    python -m benchmarks.engine_arms --concurrency 1 2 4 8 16 32 64 --requests 198 \
        --out benchmarks/results/arms.json

All arms read with the same copy of the weights and write to the same memory: where they lie decides up to
a tenth of the speed, and where the rest of an engine lies still some hundredths. So all are built anew
several times for each concurrency, in another order each time; the planner goes on with what it has
learned. Users ask the held-out prompts, and answers end where the target ends them. Arms take turns every
few answers, because other users of a machine change its speed within seconds. A ratio is that of all
tokens over all seconds, with the 95 % interval of a bootstrap over turns. On a GPU `--grown` makes the
shape of Qwen3-8B of target and drafter (see `grown.py`); there weights are fused once for all engines, and
each has a memory of its own. With `--eager` passes are PyTorch operations: slow, and of nearly the same
cost whatever they hold, so that drafting pays.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.engine_load import Load, run_closed
from benchmarks.measured_pair import add_pair_options, open_measured_pair
from benchmarks.result_file import print_result, write_result
from draftkit.draft.drafter import Drafter
from draftkit.engine.engine import Engine
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.plan import LengthPlanner
from draftkit.engine.settings import EngineSettings
from draftkit.evaluate.run import device_name
from draftkit.target.transformers import TransformersTarget

ARMS = ["off", "fixed", "planned"]
FEW = 6  # answers of a turn, or one per user
TURNS = 24  # at least: short runs would show what a planner pays to learn, once for each concurrency
BUILDS = 4  # of the engines, for each concurrency
GROWN_KV_BYTES = 11 * 2**30  # 256 requests at their longest


def share(engines: Sequence[Engine]) -> None:
    """Let all read with the first one's compiled target; what its memory holds must be forgotten when another
    one goes on.

    Raises SystemExit when their memories differ in size.
    """
    models = [engine._models for engine in engines]
    if len({model.pool.num_blocks for model in models}) > 1:
        raise SystemExit(
            f"the engines have {[model.pool.num_blocks for model in models]} blocks and cannot share a memory"
        )
    first = models[0].model
    for model in models[1:]:
        if isinstance(first, PagedModel) and isinstance(model.model, PagedModel):
            model.model.native = first.native


def build(
    names: Sequence[str], target: TransformersTarget, drafter: Drafter, settings: EngineSettings, shared: bool
) -> dict[str, Engine]:
    """The engines of all arms, in this order, with their passes compiled."""
    engines = {
        name: Engine(
            target,
            None if name == "off" else drafter,
            replace(settings, plan="planned" if name == "planned" else "fixed"),
        )
        for name in names
    }
    if shared and all(engine.compiled for engine in engines.values()):
        share(list(engines.values()))
    return engines


def ratio(seconds_TA: np.ndarray, above: str, below: str | None = None) -> dict[str, float]:
    """Speed of the arm `above` over that of `below` (None: the faster of the other two) from seconds [turns,
    arms] for the same answers, and its 95 % interval."""

    def of(total_A: np.ndarray) -> float:
        slower = dict(zip(ARMS, total_A.tolist(), strict=True))
        own = slower.pop(above)
        return float((min(slower.values()) if below is None else slower[below]) / own)

    rng = np.random.default_rng(0)
    drawn = [
        of(seconds_TA[turns].sum(0)) for turns in rng.integers(0, len(seconds_TA), (2000, len(seconds_TA)))
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"ratio": of(seconds_TA.sum(0)), "low": float(low), "high": float(high)}


def summarise(concurrency: int, turns: list[dict[str, Load]]) -> dict[str, Any]:
    """Speeds, ratios, and what the drafts did, of one concurrency."""
    arms = {}
    for name in ARMS:
        runs = [turn[name] for turn in turns]
        rounds = sum(r.rounds for r in runs)
        arms[name] = {
            "tokens_per_second": sum(r.tokens for r in runs) / sum(r.seconds for r in runs),
            "accepted_length": sum(r.accepted_length * r.rounds for r in runs) / rounds if rounds else 1.0,
            "verified_per_round": sum(r.verified_per_round * r.rounds for r in runs) / rounds
            if rounds
            else 0.0,
        }
    seconds_TA = np.array([[turn[name].seconds for name in ARMS] for turn in turns])
    return {
        "concurrency": concurrency,
        "turns": len(turns),
        "answers_per_arm": len(turns) * max(FEW, concurrency),
        "arms": arms,
        "fixed_over_off": ratio(seconds_TA, "fixed", "off"),
        "planned_over_off": ratio(seconds_TA, "planned", "off"),
        "planned_over_better": ratio(seconds_TA, "planned"),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_pair_options(parser)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--requests", type=int, default=198, help="answers per arm and concurrency")
    parser.add_argument(
        "--turns", type=int, default=TURNS, help="at least: a turn is 6 answers, or one for each user"
    )
    parser.add_argument("--new-tokens", type=int, default=128, help="of an answer at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = open_measured_pair(options, 128)
    target, drafter, prompts = pair.target, pair.drafter, pair.prompts
    if drafter is None:
        parser.error("--drafter none: two of the three arms draft; give a drafter")
    large = target.device.type == "cuda"
    longest = max(len(prompt) for prompt in prompts) + options.new_tokens
    length = -(-longest // 16) * 16  # so that as many blocks are needed with a drafter as without
    most = max(64, *options.concurrency)
    settings = EngineSettings(
        compile=not options.eager,
        max_length=length,
        max_running=most,
        kv_bytes=GROWN_KV_BYTES if large else 2**30,
    )
    at_once, answers = (most, most) if large else (8, 16)  # to warm up
    planner: LengthPlanner | None = None

    def built(count: int) -> dict[str, Engine]:
        nonlocal planner
        names = ARMS[count % 3 :] + ARMS[: count % 3]
        engines = build(names, target, drafter, settings, not large)
        if planner is not None:
            engines["planned"]._planner = planner
        planner = engines["planned"]._planner
        for engine in engines.values():
            run_closed(engine, prompts, at_once, answers, 16)
        return engines

    orders = list(permutations(ARMS))  # so that each comes as often behind each of the others
    builds = 1 if large else BUILDS  # recording takes long, and no weights lie twice there
    engines = built(0)
    result: dict[str, Any] = {
        "device": device_name(target.device),
        "threads": options.threads,
        "clock": "processor time" if options.threads == 1 else "wall clock",
        "compiled": all(engine.compiled for engine in engines.values()),
        "target": target.info.name,
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "new_tokens": options.new_tokens,
        "levels": [],
    }
    for concurrency in options.concurrency:
        together = max(FEW, concurrency)
        turns: list[dict[str, Load]] = []
        count = max(-(-options.requests // together), options.turns)
        for turn in track(range(count), f"{concurrency} at once"):
            if builds > 1 and turn % -(-count // builds) == 0:
                engines.clear()
                gc.collect()  # engines hold themselves, and gigabytes
                engines = built(turn * builds // count)
            asked = [prompts[(turn * together + i) % len(prompts)] for i in range(together)]
            loads = {}
            for name in orders[turn % len(orders)]:
                engines[name]._models.pool.forget()
                loads[name] = run_closed(
                    engines[name], asked, concurrency, together, options.new_tokens, ignore_eos=False
                )
            turns.append(loads)
        result["levels"].append(summarise(concurrency, turns))
        write_result(result, options.out)
    print_result(result, None)


if __name__ == "__main__":
    main()

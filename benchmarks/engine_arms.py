"""The engine without a drafter, with proposals of fixed length, and with planned lengths, at several
concurrencies.

    python -m benchmarks.engine_arms                            # SmolLM2 with its drafter, 1 to 16 users
    python -m benchmarks.engine_arms --concurrency 1 8 --minutes 2 --out arms.json

All arms read with the same copy of the weights and write to the same memory: where they lie decides up to
a tenth of the speed, and where the rest of an engine lies still some hundredths. So all are built twice
for each concurrency, in another order; the planner goes on with what it has
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
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine_load import Load, run_closed
from benchmarks.measured_pair import add_pair_options, open_measured_pair
from benchmarks.result_file import write_result
from draftkit.draft.drafter import Drafter
from draftkit.engine.engine import Engine
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.plan import LengthPlanner
from draftkit.engine.settings import EngineSettings
from draftkit.target.transformers import TransformersTarget

ARMS = ["off", "fixed", "planned"]
EACH = 3  # answers of a turn, per user: at its end users are idle, sooner where answers come unevenly
BUILDS = 2  # of the engines, for each concurrency
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
        "answers_per_arm": len(turns) * EACH * concurrency,
        "arms": arms,
        "fixed_over_off": ratio(seconds_TA, "fixed", "off"),
        "planned_over_off": ratio(seconds_TA, "planned", "off"),
        "planned_over_better": ratio(seconds_TA, "planned"),
    }


def line(level: dict[str, Any]) -> str:
    """A level of the table."""
    arms, better = level["arms"], level["planned_over_better"]
    speeds = "".join(f"{arms[name]['tokens_per_second']:9.1f}" for name in ARMS)
    drafts = f"{arms['fixed']['accepted_length']:10.2f}{arms['planned']['verified_per_round']:10.2f}"
    ratios = f"{level['fixed_over_off']['ratio']:11.3f}{level['planned_over_off']['ratio']:13.3f}"
    spread = f"{better['ratio']:9.3f} [{better['low']:.3f}, {better['high']:.3f}]"
    return f"{level['concurrency']:5}{level['turns']:7}{speeds}{drafts}{ratios}{spread}"


HEADING = (
    "                 tokens per second          accepted  verified\n"
    "users  turns      off    fixed  planned     fixed   planned  fixed/off  planned/off"
    "  planned/better (95 %)"
)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_pair_options(parser)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--minutes", type=float, default=2.0, help="of each concurrency, besides building")
    parser.add_argument("--new-tokens", type=int, default=64, help="of an answer at most")
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
    most = max(options.concurrency)
    settings = EngineSettings(
        compile=not options.eager,
        max_length=-(-longest // 16) * 16,  # so that as many blocks are needed with a drafter as without
        max_running=most,
        kv_bytes=GROWN_KV_BYTES if large else 2**30,
    )
    planner: LengthPlanner | None = None

    def built(names: Sequence[str]) -> dict[str, Engine]:
        nonlocal planner
        engines = build(names, target, drafter, settings, not large)
        if planner is not None:
            engines["planned"]._planner = planner
        planner = engines["planned"]._planner
        for engine in engines.values():
            run_closed(engine, prompts, most, most, 8)  # to warm up
        return engines

    orders = list(permutations(ARMS))  # so that each comes as often after each of the others
    result: dict[str, Any] = {
        "threads": options.threads,
        "clock": "processor time" if options.threads == 1 else "wall clock",
        "target": target.info.name,
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "new_tokens": options.new_tokens,
        "levels": [],
    }
    engines: dict[str, Engine] = {}
    for concurrency in options.concurrency:
        turns: list[dict[str, Load]] = []
        for half in range(1 if large else BUILDS):  # recording takes long, and no weights lie twice there
            if not (large and engines):
                engines.clear()
                gc.collect()  # engines hold gigabytes
                engines = built(ARMS[half:] + ARMS[:half])
            until = time.monotonic() + 60 * options.minutes / (1 if large else BUILDS)
            while time.monotonic() < until or len(turns) < 2 * (half + 1):
                turns.append(take_turn(engines, orders, prompts, concurrency, len(turns), options.new_tokens))
        result["levels"].append(summarise(concurrency, turns))
        result["compiled"] = all(engine.compiled for engine in engines.values())
        print(f"{HEADING}\n" * (len(result["levels"]) == 1) + line(result["levels"][-1]), flush=True)
        write_result(result, options.out)


def take_turn(
    engines: dict[str, Engine],
    orders: Sequence[Sequence[str]],
    prompts: Sequence[tuple[int, ...]],
    concurrency: int,
    turn: int,
    new_tokens: int,
) -> dict[str, Load]:
    """The same few answers by every arm, nothing of them known before."""
    together = EACH * concurrency
    asked = [prompts[(turn * together + i) % len(prompts)] for i in range(together)]
    loads = {}
    for name in orders[turn % len(orders)]:
        engines[name]._models.pool.forget()
        loads[name] = run_closed(engines[name], asked, concurrency, together, new_tokens, ignore_eos=False)
    return loads


if __name__ == "__main__":
    main()

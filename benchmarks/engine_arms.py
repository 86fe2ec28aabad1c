"""The engine without a drafter, with proposals of fixed length, and with planned lengths, at several concurrencies.

    python benchmarks/engine_arms.py DRAFTER --concurrency 1 2 4 8 16 32 64 --repeats 3 --out benchmarks/results/arms.json

Arms take turns within every repeat; a ratio compares runs of the same repeat, and the median over repeats is reported.
With `--eager` passes are PyTorch operations: slow, and of nearly the same cost whatever they hold, so that drafting pays.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from engine_load import Load, processor, read_prompts, run_closed
from result_file import print_result
from rich.progress import track

from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.target.transformers import load_target


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(concurrency: int, runs: dict[str, list[Load]]) -> dict[str, Any]:
    """Speeds, ratios within repeats, and what the drafts did, of one concurrency."""
    arms = {
        name: {
            "tokens_per_second": spread([r.speed for r in found]),
            "accepted_length": statistics.median(r.accepted_length for r in found),
            "verified_per_round": statistics.median(r.verified_per_round for r in found),
            "overhead": statistics.median(r.overhead for r in found),
        }
        for name, found in runs.items()
    }
    rows = list(zip(*(runs[name] for name in ("off", "fixed", "planned")), strict=True))
    return {
        "concurrency": concurrency,
        "arms": arms,
        "fixed_over_off": spread([f.speed / o.speed for o, f, _ in rows]),
        "planned_over_off": spread([p.speed / o.speed for o, _, p in rows]),
        "planned_over_better": spread([p.speed / max(o.speed, f.speed) for o, f, p in rows]),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--requests-per-user", type=int, default=1, help="at least 24 in all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = read_prompts(options.target, 128)
    target = load_target(options.target)
    drafter, compile = str(options.drafter), not options.eager
    engines = {
        "off": Engine(target, None, EngineSettings(compile=compile)),
        "fixed": Engine(target, drafter, EngineSettings(plan="fixed", compile=compile)),
        "planned": Engine(target, drafter, EngineSettings(plan="planned", compile=compile)),
    }
    compiled = [engine.wait_until_compiled() for engine in engines.values()]
    for engine in engines.values():
        run_closed(engine, prompts, 8, 16, 16)
    runs: dict[int, dict[str, list[Load]]] = {n: {name: [] for name in engines} for n in options.concurrency}
    for repeat in track(range(options.repeats), "repeats"):
        for concurrency in options.concurrency:
            order = list(engines)[repeat % 3 :] + list(engines)[: repeat % 3]
            for name in order:
                requests = max(24, concurrency * options.requests_per_user)
                runs[concurrency][name].append(
                    run_closed(engines[name], prompts, concurrency, requests, options.new_tokens)
                )
    result = {
        "cpu": processor(),
        "threads": options.threads,
        "clock": "processor time" if options.threads == 1 else "wall clock",
        "compiled": all(compiled),
        "target": options.target,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "levels": [summarise(n, found) for n, found in runs.items()],
    }
    print_result(result, options.out)


if __name__ == "__main__":
    main()

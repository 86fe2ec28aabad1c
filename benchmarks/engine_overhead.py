"""Share of the engine's steps that is not a forward pass, at several concurrencies, with and without a drafter.

    python benchmarks/engine_overhead.py DRAFTER --out benchmarks/results/engine_overhead.json

A drafter's pass here is its backbone and heads; drawing tokens from its logits counts as overhead, and so do verification,
scheduling and bookkeeping.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from engine_load import read_prompts, run_closed
from result_file import print_result

from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.evaluate.run import device_name
from draftkit.target.transformers import load_target


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts, target = read_prompts(options.target, 64), load_target(options.target)
    engines = {
        "off": Engine(target, None, EngineSettings()),
        "fixed": Engine(target, str(options.drafter), EngineSettings(plan="fixed")),
        "planned": Engine(target, str(options.drafter), EngineSettings()),
    }
    compiled = [engine.compiled for engine in engines.values()]
    levels = []
    for concurrency in options.concurrency:
        shares: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(options.repeats + 1):
            for name, engine in engines.items():
                shares[name].append(run_closed(engine, prompts, concurrency, max(2, concurrency), 64).overhead)
        found = {name: spread(values[1:]) for name, values in shares.items()}  # the first repeat warms up
        levels.append({"concurrency": concurrency, "overhead": found})
    result = {"cpu": device_name(), "threads": options.threads, "compiled": all(compiled), "levels": levels}
    print_result(result, options.out)


if __name__ == "__main__":
    main()

"""Share of the engine's steps that is not a forward pass, at several concurrencies, with and without a
drafter.

    python -m benchmarks.engine_overhead --out benchmarks/results/engine_overhead.json

A drafter's pass here is its backbone and heads; drawing tokens from its logits counts as overhead, and so do
verification, scheduling and bookkeeping.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.engine_load import run_closed
from benchmarks.measured_pair import add_pair_options, open_measured_pair
from benchmarks.result_file import print_result
from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_pair_options(parser)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = open_measured_pair(options, 64)
    prompts, target, drafter = pair.prompts, pair.target, pair.drafter
    engines = {
        "off": Engine(target, None, EngineSettings()),
        "fixed": Engine(target, drafter, EngineSettings(plan="fixed")),
        "planned": Engine(target, drafter, EngineSettings()),
    }
    compiled = [engine.compiled for engine in engines.values()]
    levels = []
    for concurrency in options.concurrency:
        shares: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(options.repeats + 1):
            for name, engine in engines.items():
                shares[name].append(
                    run_closed(engine, prompts, concurrency, max(2, concurrency), 64).overhead
                )
        found = {name: spread(values[1:]) for name, values in shares.items()}  # the first repeat warms up
        levels.append({"concurrency": concurrency, "overhead": found})
    facts = {"target": target.info.name, "threads": options.threads, "compiled": all(compiled)}
    print_result(facts | {"levels": levels}, options.out)


if __name__ == "__main__":
    main()

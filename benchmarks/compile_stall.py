"""What building the compiled pass costs those who are being served meanwhile: milliseconds per one-token pass of the embedded
target before, during and after, from an empty cache folder and from a filled one.

    python -m benchmarks.compile_stall --out result.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.result_file import print_result
from draftkit.engine.compiled import CompiledPasses
from draftkit.engine.fast_model import FastModel
from draftkit.engine.passes import Pass
from draftkit.target.transformers import TransformersTarget, load_target

BLOCK, CONTEXT, ALONE = 16, 100, 200  # positions per block, tokens read before, passes before and after


def one_pass(model: FastModel) -> float:
    """Milliseconds of one pass of one token behind a context, building its indices included."""
    began = time.perf_counter()
    one, table = np.ones(1, np.int64), np.arange(CONTEXT // BLOCK + 1)[None]
    model.read(Pass(one, one * CONTEXT, one, table, BLOCK, torch.device("cpu"), torch.float32), None)
    return (time.perf_counter() - began) * 1e3


def describe(milliseconds: list[float]) -> dict[str, float]:
    """How many, median, 95th percentile and longest."""
    ordered = sorted(milliseconds)
    return {
        "passes": len(ordered),
        "median": round(statistics.median(ordered), 3),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
        "longest": round(ordered[-1], 3),
    }


def measure(target: TransformersTarget) -> dict[str, object]:
    """Passes one after the other while the compiled pass is built beside them."""
    model = FastModel(target, slots=64 * BLOCK, max_length=2048)
    before = [one_pass(model) for _ in range(ALONE)]
    began = time.perf_counter()
    passes, during = CompiledPasses(model), list[float]()
    while not passes.wait(0):
        if passes.reason is not None:
            raise SystemExit(f"nothing to measure: {passes.reason}")
        during.append(one_pass(model))
    seconds = time.perf_counter() - began
    after = [one_pass(model) for _ in range(ALONE)]
    found: dict[str, object] = {"seconds_to_ready": round(seconds, 2), "before": describe(before), "after": describe(after)}
    return found | ({"during": describe(during)} if during else {})


def main() -> None:
    """Measure twice and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = load_target("tiny")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        result = {"threads": options.threads, "empty_cache": measure(target), "filled_cache": measure(target)}
    print_result(result, options.out)


if __name__ == "__main__":
    main()

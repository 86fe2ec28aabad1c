"""Time of a plan: 256 and 1,024 requests x 7 positions, medians of 200 calls each.

python -m benchmarks.planner_time --out benchmarks/results/planner_time.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.result_file import print_result
from draftkit.schedule.planner import admit, budget_from, plan_verification, survival_of
from draftkit.schedule.simulate import parametric_table

CALLS = 200


def main() -> None:
    """Measure and print one JSON object; microseconds, median and quartiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    step_rate = parametric_table(256, 32).at(0)
    found: dict[str, dict[str, list[float]]] = {}
    for requests in (256, 1024):
        confidence_RG = np.random.default_rng(0).uniform(0.4, 1.0, (requests, 7))
        survival_RG = survival_of(confidence_RG)
        calls = {
            "survival_of": lambda c=confidence_RG: survival_of(c),
            "plan_verification": lambda s=survival_RG: plan_verification(s, step_rate),
            "budget_from": lambda s=survival_RG: budget_from(s, step_rate),
            "admit": lambda s=survival_RG, r=requests: admit(s, 2 * r),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(CALLS):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
        found[f"{requests} x 7"] = {
            name: [round(1e6 * float(v), 1) for v in np.percentile(values, [50, 25, 75])]
            for name, values in seconds.items()
        }
    print_result({"microseconds_median_and_quartiles": found}, options.out)


if __name__ == "__main__":
    main()

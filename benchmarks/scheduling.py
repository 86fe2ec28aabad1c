"""The scheduled arms against every fixed length and no speculation, over loads, on measured and parametric
step rates.

    python -m benchmarks.scheduling --out benchmarks/results/scheduling.json

Uses the embedded pair's recorded traces. Prints per table and load the ratios asked for, and where the
paper's comparison at matched speed (budget arm against a one-token drafter) falls.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.result_file import write_result
from draftkit.evaluate.schedule_plots import plot_simulation
from draftkit.schedule.machines import MACHINES
from draftkit.schedule.simulate import Load, Outcome, arms_for, simulate
from draftkit.schedule_stages import open_simulation

LOADS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SCHEDULED = ("algorithm 1", "budget")


def curve(outcomes: list[Outcome]) -> np.ndarray:
    """(tokens per second of a user, of all) along the loads, linear between neighbouring ones, [points,
    2]."""
    points = np.array([[o.user_speed, o.throughput] for o in outcomes])
    steps = np.linspace(0, len(points) - 1, 400)
    return np.stack([np.interp(steps, np.arange(len(points)), column) for column in points.T], 1)


def matched(base: list[Outcome], arm: list[Outcome], axis: int) -> dict[str, float]:
    """What `arm` gains on the other axis at 50, 75 and 90 % of the best that `base` reaches on `axis` (0
    speed of a user, 1 throughput): the most that each reaches at any load without falling below that."""
    own, other = curve(arm), curve(base)
    found = {}
    for share in (0.5, 0.75, 0.9):
        wanted = share * other[:, axis].max()
        reached = [
            c[c[:, axis] >= wanted, 1 - axis].max() for c in (own, other) if (c[:, axis] >= wanted).any()
        ]
        if len(reached) == 2:
            found[f"{wanted:.1f}"] = float(reached[0] / reached[1] - 1)
    return found


def main() -> None:
    """Simulate, print, and write JSON and one plot per table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--step-rate", help="measured table; none = the embedded pair's")
    parser.add_argument(
        "--tables", nargs="+", choices=["measured", *MACHINES], default=["measured", *MACHINES]
    )
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {"requests": options.requests, "loads": LOADS}
    for name in options.tables:
        chosen = options.step_rate if name == "measured" else name
        source = open_simulation(options.traces, chosen, options.calibration)
        arms = arms_for(source.traces.gamma)
        found: dict[str, list[Outcome]] = {arm: [] for arm in arms}
        began = time.perf_counter()
        for load in LOADS:
            work = Load(max(options.requests, 8 * load) if load > 4 else options.requests // 4, load)
            for arm, decide in arms.items():
                found[arm].append(
                    simulate(source.traces, source.table, work, arm, decide, source.calibration)
                )
        rows = {}
        for arm in SCHEDULED:
            fixed = [
                max(found[f][i].throughput for f in found if f.startswith(("fixed", "one")))
                for i in range(len(LOADS))
            ]
            rows[arm] = {
                "over_best_fixed": [o.throughput / f for o, f in zip(found[arm], fixed, strict=True)],
                "over_none": [
                    o.throughput / n.throughput
                    for o, n in zip(found[arm], found["no speculation"], strict=True)
                ],
                "over_fixed_7": [
                    o.throughput / n.throughput for o, n in zip(found[arm], found["fixed 7"], strict=True)
                ],
                "over_oracle": [
                    o.throughput / n.throughput for o, n in zip(found[arm], found["oracle"], strict=True)
                ],
                "verified": [o.verified_mean for o in found[arm]],
                "throughput_at_matched_speed": matched(found["one token"], found[arm], 0),
                "speed_at_matched_throughput": matched(found["one token"], found[arm], 1),
            }
            print(name, arm, f"({time.perf_counter() - began:.0f} s for all arms and loads)")
            for key, values in rows[arm].items():
                named = dict(zip(LOADS, values, strict=True)) if isinstance(values, list) else values
                print("   ", key, {k: round(v, 3) for k, v in named.items()})
        result[name] = rows
        plot_simulation(
            [o for own in found.values() for o in own], options.out.with_name(f"scheduling_{name}.png")
        )
    write_result(result, options.out)


if __name__ == "__main__":
    main()

"""The scheduled arms against every fixed length and no speculation, over loads, on measured and parametric
step rates.

    python -m benchmarks.scheduling                                      # traces of SmolLM2 and its drafter
    python -m benchmarks.scheduling --traces traces.safetensors --calibration calibration.json \\
        --step-rate step_rate.json --out scheduling.json                 # of another one

Prints throughput over no speculation and over the best fixed length at each load; the file also has the
paper's comparison at matched speed (budget arm against a one-token drafter).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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


def ratios(found: dict[str, list[Outcome]], arm: str) -> dict[str, Any]:
    """Throughput of an arm over those of others at each load, and what the paper's comparison gives."""
    fixed = [name for name in found if name.startswith(("fixed", "one"))]

    def over(names: list[str]) -> list[float]:
        best = [max(found[name][i].throughput for name in names) for i in range(len(LOADS))]
        return [own.throughput / other for own, other in zip(found[arm], best, strict=True)]

    return {
        "over_none": over(["no speculation"]),
        "over_best_fixed": over(fixed),
        "over_oracle": over(["oracle"]),
        "verified": [outcome.verified_mean for outcome in found[arm]],
        "throughput_at_matched_speed": matched(found["one token"], found[arm], 0),
        "speed_at_matched_throughput": matched(found["one token"], found[arm], 1),
    }


def main() -> None:
    """Simulate, print a table, and write JSON and one plot per step rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON; plots go beside it")
    parser.add_argument("--requests", type=int, default=300, help="of a load, and 8 per user at least")
    parser.add_argument("--traces", type=Path, help="default: SmolLM2's pair")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--step-rate", help="measured table; default: SmolLM2's pair")
    parser.add_argument(
        "--tables", nargs="+", choices=["measured", *MACHINES], default=["measured", *MACHINES]
    )
    options = parser.parse_args()
    result: dict[str, Any] = {"requests": options.requests, "loads": LOADS}
    print("throughput over others, by users:" + "".join(f"{load:7}" for load in LOADS))
    for name in options.tables:
        chosen = options.step_rate if name == "measured" else name
        source = open_simulation(options.traces, chosen, options.calibration)
        arms = arms_for(source.traces.gamma)
        found: dict[str, list[Outcome]] = {arm: [] for arm in arms}
        for load in LOADS:
            work = Load(max(options.requests, 8 * load) if load > 4 else max(options.requests // 4, 8), load)
            for arm, decide in arms.items():
                found[arm].append(
                    simulate(source.traces, source.table, work, arm, decide, source.calibration)
                )
        result[name] = {arm: ratios(found, arm) for arm in SCHEDULED}
        for arm, rows in result[name].items():
            for key in ("over_none", "over_best_fixed"):
                label = f"{name} {arm} {key.replace('_', ' ')}"
                print(f"{label:33}" + "".join(f"{value:7.3f}" for value in rows[key]), flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            outcomes = [o for own in found.values() for o in own]
            plot_simulation(outcomes, options.out.with_name(f"scheduling_{name}.png"))
    write_result(result, options.out)


if __name__ == "__main__":
    main()

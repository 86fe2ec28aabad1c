r"""How well a drafter without a confidence head can be planned: acceptance so far by position, against the
estimator.

    python -m benchmarks.acceptance_estimate greedy.safetensors sampled.safetensors \
        --out benchmarks/results/NAME.json

`draftkit calibrate -d DRAFTER` records the traces, before it says that there is no head to calibrate. Both
estimates learn from every other prompt, verified in full. On the prompts between, AUC and expected
calibration error of the survivals; and 32 requests at a time walk through them with the same number of
drafted tokens verified per step, given to the largest survivals: tokens per target pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.result_file import print_result
from draftkit.schedule.estimator import AcceptanceEstimator
from draftkit.schedule.planner import admit, survival_of
from draftkit.schedule.step_rate import Floats, Ints
from draftkit.schedule.temperature_scaling import quality_of
from draftkit.schedule.traces import TracedPrompt, Traces, load_traces

TOGETHER = 32
Estimate = Callable[[Ints], Floats]  # rows of the trace to confidences [R, G]


def acceptance_so_far(traces: Traces, rows: Ints) -> Estimate:
    """How often each position was kept when those before it were, over `rows`: the same for every
    proposal."""
    kept_NG, usable_NG = traces.labels()
    reached_NG = usable_NG & (np.arange(traces.gamma) <= traces.accepted_N[:, None])
    mean_G = (kept_NG[rows].sum(0) + 1) / (reached_NG[rows].sum(0) + 1)
    return lambda chosen: np.tile(mean_G, (len(chosen), 1))


def learned(traces: Traces, rows: Ints) -> Estimate:
    """The estimator after it has seen `rows`, 32 at a time."""
    estimator = AcceptanceEstimator(traces.gamma)
    for part in np.array_split(rows, max(1, len(rows) // TOGETHER)):
        estimator.observe(traces.draft_max_NG[part], traces.accepted_N[part], traces.usable_N[part])
    return lambda chosen: estimator.confidence(traces.draft_max_NG[chosen])


def walk(
    traces: Traces, prompts: list[TracedPrompt], estimate: Estimate, per_request: int
) -> tuple[float, float]:
    """Tokens and verified drafted tokens per request and target pass; a request that is finished makes room
    for the next."""
    waiting = [(p.first, p.first + p.rows) for p in prompts][::-1]
    lanes: list[tuple[int, int]] = []
    tokens = verified = passes = 0
    position_G = np.arange(traces.gamma)
    while waiting or lanes:
        while waiting and len(lanes) < TOGETHER:
            lanes.append(waiting.pop())
        if len(lanes) < TOGETHER:
            break  # an emptying batch has fewer to choose from
        rows = np.array([row for row, _ in lanes])
        survival_RG = survival_of(estimate(rows))
        survival_RG = np.where(position_G < traces.usable_N[rows][:, None], survival_RG, 0.0)
        lengths_R = admit(survival_RG, per_request * len(rows))
        gained_R = np.minimum(traces.accepted_N[rows], lengths_R) + 1
        tokens, verified, passes = tokens + gained_R.sum(), verified + lengths_R.sum(), passes + len(rows)
        moved = [(row + int(n), end) for (row, end), n in zip(lanes, gained_R, strict=True)]
        lanes = [(row, end) for row, end in moved if row < end]
    return float(tokens / passes), float(verified / passes)


def compare(traces: Traces) -> dict[str, object]:
    """Both estimates on the prompts that they have not seen."""
    rows, held_out = traces.rows_of(traces.prompts[::2]), list(traces.prompts[1::2])
    held = traces.rows_of(held_out)
    kept_NG, usable_NG = traces.labels()
    found: dict[str, object] = {
        "temperature": traces.origin.temperature,
        "prompts": len(traces.prompts),
        "rows": len(held),
    }
    for name, estimate in (
        ("history", acceptance_so_far(traces, rows)),
        ("estimator", learned(traces, rows)),
    ):
        quality = quality_of(estimate(held), kept_NG[held], usable_NG[held])
        walks = [walk(traces, held_out, estimate, k) for k in range(1, traces.gamma)]
        found[name] = {
            "auc": [round(a, 4) for a in quality.auc],
            "ece": [round(e, 4) for e in quality.ece],
            "tokens_per_pass": {k + 1: round(t, 4) for k, (t, _) in enumerate(walks)},
            "verified_per_pass": {k + 1: round(v, 4) for k, (_, v) in enumerate(walks)},
        }
    return found


def main() -> None:
    """Compare and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {"traces": [compare(load_traces(path)) for path in options.traces]}
    print_result(result, options.out)


if __name__ == "__main__":
    main()

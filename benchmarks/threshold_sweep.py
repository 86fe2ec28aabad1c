r"""Static confidence threshold 0 to 0.8: accepted share of verified tokens and tokens per step, by domain
(Figure 5).

    python -m benchmarks.threshold_sweep calibration/traces.safetensors \
        --out benchmarks/results/threshold_sweep.json

Walks every traced prompt once per threshold, on the raw confidences as the paper does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.result_file import write_result
from draftkit.evaluate.schedule_plots import plot_thresholds
from draftkit.schedule.planner import plan_threshold
from draftkit.schedule.traces import TracedPrompt, Traces, load_traces

THRESHOLDS = [round(0.1 * i, 1) for i in range(9)]


def sweep(traces: Traces, prompts: list[TracedPrompt], threshold: float) -> tuple[float, float]:
    """Accepted share of the verified tokens, and tokens per step."""
    lengths_N = np.minimum(plan_threshold(traces.confidence_NG, threshold), traces.usable_N)
    accepted_N = np.minimum(traces.accepted_N, lengths_N)
    verified = accepted = tokens = steps = 0
    for prompt in prompts:
        row, end = prompt.first, prompt.first + prompt.rows
        while row < end:
            verified += int(lengths_N[row])
            accepted += int(accepted_N[row])
            row += int(accepted_N[row]) + 1
            steps += 1
        tokens += prompt.rows
    return accepted / max(verified, 1), tokens / steps


def main() -> None:
    """Sweep, print a table, write JSON and a plot beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    traces = load_traces(options.traces)
    found, curves = {}, {}
    for domain in dict.fromkeys(p.domain for p in traces.prompts):
        prompts = [p for p in traces.prompts if p.domain == domain]
        rows = [sweep(traces, prompts, t) for t in THRESHOLDS]
        found[domain] = {"acceptance_rate": [r[0] for r in rows], "tokens_per_step": [r[1] for r in rows]}
        curves[domain] = tuple(np.array(column) for column in zip(*rows, strict=True))
        print(
            f"{domain:8} "
            + "  ".join(f"{t}: {r:.3f}, {n:.2f}" for t, (r, n) in zip(THRESHOLDS, rows, strict=True))
        )
    result = {
        "temperature": traces.origin.temperature,
        "prompts": len(traces.prompts),
        "thresholds": THRESHOLDS,
        "domains": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_result(result, options.out)
    plot_thresholds(THRESHOLDS, curves, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

r"""Block verification against the token-wise rule on the same answers and the same proposals.

    python -m benchmarks.block_verification calibration/traces.safetensors \
        --out benchmarks/results/block_verification.json

Both rules verified the proposal after every token of the target's own answers
(`draftkit/schedule/record.py`), with the same uniforms. The accepted length (bonus included) is taken
along the rounds that each rule would walk. The interval is a bootstrap over prompts of the ratio of the
two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.result_file import print_result
from draftkit.schedule.step_rate import Ints
from draftkit.schedule.traces import Traces, load_traces


def walk(traces: Traces, accepted_N: Ints) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and rounds per prompt, [P] each, when every proposal is verified in full."""
    tokens, rounds = [], []
    for prompt in traces.prompts:
        row, end, count = prompt.first, prompt.first + prompt.rows, 0
        while row < end:
            row += int(accepted_N[row]) + 1
            count += 1
        tokens.append(prompt.rows)
        rounds.append(count)
    return np.array(tokens, float), np.array(rounds, float)


def main() -> None:
    """Compare and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    traces = load_traces(options.traces)
    (tokens, token_R), (_, block_R) = (walk(traces, a) for a in (traces.accepted_N, traces.block_accepted_N))
    chosen = np.random.default_rng(0).integers(0, len(tokens), (4000, len(tokens)))
    low, high = np.percentile(token_R[chosen].sum(1) / block_R[chosen].sum(1), [2.5, 97.5])
    result = {
        "temperature": traces.origin.temperature,
        "prompts": len(tokens),
        "anchors": len(traces.accepted_N),
        "accepted_len": {"token": tokens.sum() / token_R.sum(), "block": tokens.sum() / block_R.sum()},
        "ratio": token_R.sum() / block_R.sum(),
        "ratio_95": [float(low), float(high)],
        "ratio_every_anchor": (1 + traces.block_accepted_N.mean()) / (1 + traces.accepted_N.mean()),
        "anchors_where_they_differ": int((traces.block_accepted_N != traces.accepted_N).sum()),
    }
    print_result(result, options.out)


if __name__ == "__main__":
    main()

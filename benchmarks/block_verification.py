"""Block verification against the token-wise rule on the same answers and the same proposals.

    python benchmarks/block_verification.py runs/quickstart/drafter/best --temperature 1 --folder runs/block

Both rules verify the proposal behind every token of the target's own answers (`draftkit/schedule/record.py`), with the
same uniforms. The accepted length (bonus included) is taken along the rounds that each rule would walk. The interval is a
bootstrap over prompts of the ratio of the two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from draftkit import stages
from draftkit.config import load_recipe
from draftkit.evaluate.run import environment
from draftkit.ops.sampling import Sampling
from draftkit.ops.verify import RULES
from draftkit.schedule.traces import Traces
from draftkit.schedule_stages import run_record


def walk(traces: Traces) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and rounds per prompt, [P] each, when every proposal is verified in full."""
    tokens, rounds = [], []
    for prompt in traces.prompts:
        row, end, count = prompt.first, prompt.first + prompt.rows, 0
        while row < end:
            row += int(traces.accepted_N[row]) + 1
            count += 1
        tokens.append(min(row, end) - prompt.first)
        rounds.append(count)
    return np.array(tokens, float), np.array(rounds, float)


def main() -> None:
    """Record what is missing, compare, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--per-domain", type=int, default=150)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, required=True, help="for the recorded traces, which are used again")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe = load_recipe("tiny-dspark", [])
    target, tokenizer = stages.open_target(recipe)
    drafter = stages.open_drafter(options.drafter, target)
    prompts = stages.first_turns(tokenizer, stages.read_prompts([stages.TINY_HELD_OUT]), options.per_domain)
    sampling, seed = Sampling(options.temperature), recipe.evaluate.seed
    found = {}
    for name, rule in RULES.items():
        file = options.folder / ("traces.safetensors" if name == "token" else f"traces-{name}.safetensors")
        found[name] = run_record(target, drafter, options.drafter, prompts, sampling, options.new_tokens, seed, file, rule)
    (token_T, token_R), (block_T, block_R) = walk(found["token"]), walk(found["block"])
    chosen = np.random.default_rng(0).integers(0, len(token_T), (4000, len(token_T)))
    ratios = (block_T[chosen].sum(1) / block_R[chosen].sum(1)) / (token_T[chosen].sum(1) / token_R[chosen].sum(1))
    low, high = np.percentile(ratios, [2.5, 97.5])
    result = {
        "environment": environment(),
        "temperature": options.temperature,
        "prompts": len(token_T),
        "anchors": len(found["token"].accepted_N),
        "accepted_len": {"token": token_T.sum() / token_R.sum(), "block": block_T.sum() / block_R.sum()},
        "ratio": (block_T.sum() / block_R.sum()) / (token_T.sum() / token_R.sum()),
        "ratio_95": [float(low), float(high)],
        "ratio_every_anchor": (1 + found["block"].accepted_N.mean()) / (1 + found["token"].accepted_N.mean()),
        "anchors_where_they_differ": int((found["token"].accepted_N != found["block"].accepted_N).sum()),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""What a step costs at a real vocabulary: models and all else, at four settings and several numbers of users.

    python -m benchmarks.sampling_cost                                  # SmolLM2 with its drafter, V = 49,152
    python -m benchmarks.sampling_cost --vocab 151936 --users 1 8       # its shape with random weights

The drafter of a model with random weights is random, too, and drafts seven tokens over the whole vocabulary;
their acceptance does not matter, since every proposal is verified whole. Answers begin with prompts of random
tokens. Milliseconds per step, medians over the repeats, which take turns: drafting, the target's pass, all
else; the share of all else with what drawing adds to drafting; and drafting sampled over drafting greedily.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measured_pair import MeasuredPair, add_pair_options, default_target, open_measured_pair
from benchmarks.result_file import write_result
from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.drafter import DrafterConfig
from draftkit.engine.engine import Engine
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.target.loading import load_target
from draftkit.target.transformers import DTYPES, TransformersTarget

SETTINGS: dict[str, dict[str, Any]] = {
    "T=0": {"temperature": 0.0},
    "T=1": {"temperature": 1.0},
    "T=0.7 top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "T=0.7 top-k 20 top-p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
}
PROMPT, LONGEST, GAMMA = 32, 512, 7
PARTS = {"draft": "draft_seconds", "target": "verify_seconds", "else": "other_seconds"}


def random_pair(name: str, vocab: int, dtype: str) -> MeasuredPair:
    """A target of this one's shape with another vocabulary and a drafter, both with random weights."""
    real = load_target(name, dtype=dtype, device="cpu")
    config = copy.deepcopy(real.model.config)
    config.vocab_size = vocab
    torch.manual_seed(0)
    model = type(real.model)(config).to(DTYPES[dtype])
    facts: dict[str, Any] = {
        "fingerprint": f"random {vocab}",
        "name": f"{real.info.name}, random",
        "vocab_size": vocab,
    }
    target = TransformersTarget(model, replace(real.info, **facts))
    layers = config.num_hidden_layers
    shape = DrafterConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=1,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab_size=vocab,
        feature_layers=(1, layers // 2, layers - 2),
        num_target_layers=layers,
        block_size=GAMMA,
        mask_token_id=0,
        markov_rank=32,
        max_length=LONGEST,
    )
    drafter = new_drafter(shape, target.embedding_weight(), target.head_weight()).eval()
    return MeasuredPair(target, drafter, [])


def measure(engine: Engine, users: int, setting: dict[str, Any], steps: int) -> dict[str, float]:
    """Milliseconds per step of `users` who all decode."""
    rng = np.random.default_rng(users)
    for user in range(users):
        params = SamplingParams(max_tokens=LONGEST - PROMPT - 1, seed=user, ignore_eos=True, **setting)
        engine.add_request(str(user), rng.integers(0, engine.info.vocab_size, PROMPT).tolist(), params)
    waiting = set(map(str, range(users)))
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.events}
    engine.step()
    before = engine.metrics
    for _ in range(steps):
        engine.step()
    after = engine.metrics
    for user in range(users):
        engine.abort(str(user))
    return {k: 1e3 * (getattr(after, v) - getattr(before, v)) / steps for k, v in PARTS.items()}


def table(pair: MeasuredPair, users: list[int], repeats: int, steps: int) -> list[dict[str, Any]]:
    """Rows of the table, printed as they come."""
    settings = EngineSettings(plan="fixed", max_length=LONGEST, max_running=max(users))
    rows = []
    for name, drafter in (("no drafter", None), ("drafting", pair.drafter)):
        if name == "drafting" and drafter is None:
            continue
        engine = Engine(pair.target, drafter, settings)
        if not engine.compiled:
            raise SystemExit("error: the compiled passes cannot be used here")
        for count in users:
            found: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
            for _ in range(repeats):
                for setting, many in found.items():
                    many.append(measure(engine, count, SETTINGS[setting], steps))
            greedy = median(f["draft"] for f in found["T=0"])
            for setting, many in found.items():
                ms = {part: median(f[part] for f in many) for part in PARTS}
                drawing = max(0.0, ms["draft"] - greedy)  # drawing drafts is part of drafting
                row = {
                    "drafter": name,
                    "users": count,
                    "setting": setting,
                    "ms": ms,
                    "step_ms": sorted(sum(f.values()) for f in many),
                    "share_of_all_else": (ms["else"] + drawing) / sum(ms.values()),
                    "drafting_over_greedy": ms["draft"] / greedy if greedy else None,
                }
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    ms, over = row["ms"], row["drafting_over_greedy"]
    line = f"{row['drafter']:10} {row['users']:3} users  {row['setting']:25}"
    line += f"{ms['draft']:8.2f} {ms['target']:8.2f} {ms['else']:7.2f} ms"
    line += f", all else {row['share_of_all_else']:5.1%}"
    return line + (f", drafting {over:.2f} x greedy" if over else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_pair_options(parser)
    parser.add_argument("--vocab", type=int, help="random weights of the target's shape with so many tokens")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.vocab:
        name = options.target or default_target(options.drafter)
        pair = random_pair(name, options.vocab, options.dtype)
    else:
        pair = open_measured_pair(options, 1)
    print(f"V = {pair.target.info.vocab_size}; per step: drafting, target, all else", flush=True)
    rows = table(pair, options.users, options.repeats, options.steps)
    result = {"threads": options.threads, "repeats": options.repeats, "steps": options.steps}
    write_result(result | {"vocabulary": pair.target.info.vocab_size, "rows": rows}, options.out)


if __name__ == "__main__":
    main()

"""What a step costs at a real vocabulary: models and all else, at four settings and several numbers of users.

    python -m benchmarks.sampling_cost TARGET --vocab 49152 151936 --before OTHER_CHECKOUT --out FILE

For each vocabulary a model of the target's shape with random weights (0: the target itself) and a drafter
with random weights, which drafts seven tokens whose acceptance does not matter here: every proposal is
verified whole. Answers begin with prompts of random tokens. `--before` runs another checkout beside this one,
in turns, and prints its numbers first. Milliseconds per step, medians over the repeats: drafting, the
target's pass, all else; and tokens of drafting sampled over drafting greedily.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.result_file import write_result

SETTINGS: dict[str, dict[str, Any]] = {
    "T=0": {"temperature": 0.0},
    "T=1": {"temperature": 1.0},
    "T=0.7 top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "T=0.7 top-k 20 top-p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
}
STEPS, PROMPT, GAMMA = 12, 32, 7


def work(folder: str, threads: int) -> None:
    """Measure what standard input asks for, one line each: drafter or not, users, setting."""
    from draftkit.draft.checkpoint import new_drafter
    from draftkit.draft.drafter import DrafterConfig
    from draftkit.engine.engine import Engine
    from draftkit.engine.settings import EngineSettings
    from draftkit.target.transformers import load_target

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    target = load_target(folder, dtype="float32", device="cpu")
    config = target.model.config
    layers = config.num_hidden_layers
    shape = DrafterConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=1,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab_size=target.info.vocab_size,
        feature_layers=(1, layers // 2, layers - 2),
        num_target_layers=layers,
        block_size=GAMMA,
        mask_token_id=0,
        markov_rank=32,
        max_length=512,
    )
    drafter = new_drafter(shape, target.embedding_weight(), target.head_weight()).eval()
    settings = EngineSettings(plan="fixed", max_length=512, max_running=32)
    engines = {
        "no drafter": Engine(target, None, settings),
        "seven drafted": Engine(target, drafter, settings),
    }
    if not all(engine.wait_until_compiled() for engine in engines.values()):
        raise SystemExit("error: the compiled passes cannot be used here")
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(measure(engines[asked["drafter"]], asked["users"], asked["setting"])), flush=True)


def measure(engine: Any, users: int, setting: dict[str, Any]) -> dict[str, float]:
    """Milliseconds per step of `users` who all decode."""
    from draftkit.engine.request import SamplingParams

    rng = np.random.default_rng(users)
    for user in range(users):
        params = SamplingParams(max_tokens=400, seed=user, ignore_eos=True, **setting)
        engine.add_request(str(user), rng.integers(0, engine.info.vocab_size, PROMPT).tolist(), params)
    try:
        while engine.metrics.waiting or any(not r.decoding for r in engine._requests.values()):
            engine.step()
        engine.step()
        before = engine.metrics
        for _ in range(STEPS):
            engine.step()
        after = engine.metrics
    finally:
        for user in range(users):
            engine.abort(str(user))
    names = {"draft": "draft_seconds", "target": "verify_seconds", "else": "other_seconds"}
    return {k: 1e3 * (getattr(after, v) - getattr(before, v)) / STEPS for k, v in names.items()}


class Worker:
    """Another process with the package of a checkout."""

    def __init__(self, checkout: Path, folder: str, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, folder, "--worker", "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )
        self._answer()

    def ask(self, **asked: Any) -> dict[str, float]:
        """One measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._answer())
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: a measurement failed; see above")
        return line


def random_model(target: str, vocab: int, folder: str) -> None:
    """A model of the target's shape with another vocabulary and random weights, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(target)
    config.vocab_size = vocab
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(target).save_pretrained(folder)


def compare(folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    here = Path(__file__).resolve().parent.parent
    workers = {"before": options.before.resolve()} if options.before else {}
    running = {name: Worker(path, folder, options.threads) for name, path in {**workers, "now": here}.items()}
    rows = []
    for drafter in ("no drafter", "seven drafted"):
        for users in options.users:
            for name, setting in SETTINGS.items():
                found: dict[str, list[dict[str, float]]] = {worker: [] for worker in running}
                for _ in range(options.repeats):
                    for worker, process in running.items():
                        found[worker].append(process.ask(drafter=drafter, users=users, setting=setting))
                medians = {w: {k: median(f[k] for f in many) for k in many[0]} for w, many in found.items()}
                spreads = {w: [round(min(s), 2), round(max(s), 2)] for w, s in _sums(found).items()}
                rows.append(
                    {"drafter": drafter, "users": users, "setting": name, "ms": medians, "step": spreads}
                )
                print(describe(rows[-1], rows), flush=True)
    for process in running.values():
        process.close()
    return rows


def _sums(found: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
    return {worker: [sum(f.values()) for f in many] for worker, many in found.items()}


def describe(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One line of the table."""
    greedy = next(r for r in rows if (r["drafter"], r["users"]) == (row["drafter"], row["users"]))["ms"]
    parts = [f"{row['drafter']:14} {row['users']:3} users  {row['setting']:25}"]
    for worker, ms in row["ms"].items():
        draft, target, rest = ms["draft"], ms["target"], ms["else"]
        share = rest + max(0.0, draft - greedy[worker]["draft"])  # drawing drafts is part of drafting
        part = (
            f"{worker}: {draft:6.1f} {target:6.1f} {rest:6.1f} ms, all else "
            f"{share / (draft + target + rest):5.1%}"
        )
        drawn = (
            f", drafting {draft / greedy[worker]['draft']:.2f} x greedy"
            if row["drafter"] != "no drafter"
            else ""
        )
        parts.append(part + drawn)
    return " | ".join(parts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="a model folder")
    parser.add_argument(
        "--vocab", type=int, nargs="+", default=[0], help="vocabulary sizes; 0: the target's own weights"
    )
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.target, options.threads)
        return
    from draftkit.evaluate.run import device_name

    result: dict[str, Any] = {
        "cpu": device_name(),
        "threads": options.threads,
        "repeats": options.repeats,
        "vocabularies": {},
    }
    for vocab in options.vocab:
        print(f"vocabulary {vocab or 'of the target'}; ms per step: draft, target, else", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if vocab:
                random_model(options.target, vocab, folder)
            result["vocabularies"][vocab] = compare(folder if vocab else options.target, options)
        write_result(result, options.out)


if __name__ == "__main__":
    main()

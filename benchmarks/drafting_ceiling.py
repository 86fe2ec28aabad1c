r"""What drafting could reach with one user, if the engine did nothing but passes and knew what will be
accepted.

    python -m benchmarks.drafting_ceiling runs/quickstart/drafter/best \
        --out benchmarks/results/drafting_ceiling.json

Held-out prompts are answered greedily, the proposal after every token is recorded, and passes are timed
as the engine times them when it starts, several times. The simulator then replays the answers. Its time is
that of passes alone, without any of Python, so every ratio to no speculation is an upper bound of what the
engine can show here with this drafter. `oracle` knows which drafted tokens will be accepted, drafts just
where that pays and verifies nothing else. `all accepted` is a drafter that is never wrong, with rounds of
its full length.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.engine_load import answer_at_once, read_prompts
from benchmarks.result_file import print_result
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import Drafter
from draftkit.engine.engine import Engine
from draftkit.engine.settings import EngineSettings
from draftkit.ops.sampling import Sampling
from draftkit.schedule.record import TraceItem, TraceSettings, record_traces
from draftkit.schedule.simulate import Load, arms_for, simulate
from draftkit.schedule.step_rate_table import StepRateTable
from draftkit.schedule.traces import Traces
from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget

TIMED = 5  # times that passes are timed
ANSWERS = 1000  # replayed


def record(
    target: TransformersTarget, drafter: Drafter, prompts: list[tuple[int, ...]], new_tokens: int
) -> Traces:
    """Greedy answers, and the proposals after their tokens."""
    engine = Engine(target, None, EngineSettings())
    answers = answer_at_once(engine, prompts, new_tokens)
    items = [
        TraceItem(str(i), "", tuple(p), tuple(a))
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    return record_traces(target, drafter, items, TraceSettings(Sampling(0.0)), "benchmark")


def time_passes(target: TransformersTarget, drafter: Drafter) -> StepRateTable:
    """Medians of what engines measure when they start: passes of 1 to gamma + 1 tokens, and a proposal for
    one request."""
    sizes = np.arange(1, drafter.gamma + 2)
    passes, drafts = [], []
    for _ in track(range(TIMED), "timing passes"):
        engine = Engine(target, drafter, EngineSettings(plan="planned"))
        rate = engine._planner.step_rate
        if rate is None:
            raise SystemExit("the engine measured nothing; its passes are those of the Transformers module")
        passes.append(rate.target_seconds(sizes))
        drafts.append(rate.drafter_seconds(1))
    medians = tuple(np.median(passes, 0).tolist())
    return StepRateTable((0,), tuple(sizes.tolist()), (medians,), (1,), (float(np.median(drafts)),))


def ceilings(traces: Traces, table: StepRateTable) -> dict[str, Any]:
    """Tokens per second of every arm over no speculation, and its tokens per step."""
    arms = arms_for(traces.gamma)
    found = {name: simulate(traces, table, Load(ANSWERS, 1), name, arm) for name, arm in arms.items()}
    plain = found["no speculation"].throughput
    result = {
        name: {"ratio": o.throughput / plain, "tokens_per_step": o.accepted_len} for name, o in found.items()
    }
    passes, draft = table.pass_seconds[0], table.draft_seconds[0]
    whole = (traces.gamma + 1) * passes[0] / (passes[-1] + draft)
    return result | {"all accepted": {"ratio": whole, "tokens_per_step": traces.gamma + 1.0}}


def main() -> None:
    """Measure, replay, and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128, help="of an answer at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = load_target(options.target)
    drafter = open_drafter(options.drafter, target)
    table = time_passes(target, drafter)
    traces = record(target, drafter, read_prompts(options.target, options.prompts), options.new_tokens)
    result = {
        "threads": options.threads,
        "prompts": len(traces.prompts),
        "pass_seconds_by_tokens": table.pass_seconds[0],
        "draft_seconds": table.draft_seconds[0],
        "over_no_speculation": ceilings(traces, table),
    }
    print_result(result, options.out)


if __name__ == "__main__":
    main()

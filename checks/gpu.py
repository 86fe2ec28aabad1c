"""What tests cannot show without a GPU: compiled kernels, recorded graphs, and answers, against PyTorch
operations and the CPU.

    python -m checks.gpu DRAFTER [DRAFTER ...] --out checks/results/gpu.json

Families: a random small model of each family reads prompts and rounds with the kernels and without; the
largest difference of a logit, as a share of the largest logit. Answers: greedy ones of the embedded target in
float32, on the GPU without a drafter, with fixed and with planned lengths, and unrecorded, beside those of
the CPU. Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_load import read_prompts
from benchmarks.result_file import print_result
from draftkit.engine.engine import Engine
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.passes import Pass
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings

sys.path.append(str(Path(__file__).parent.parent / "tests"))
TOLERANCE = 1e-4  # in float32
ROUNDS = ([36, 2, 9], [1, 1, 1], [4, 1, 2], [6, 2, 4])  # tokens of each request
TABLES = [[5, 30, 2, 17, 9, 33, 0, 21, 12, 3, 7, 26, 14], [1, 4, 6], [8, 10, 11, 13, 15, 16]]
CPU = EngineSettings(device="cpu", dtype="float32", compile=False)
ARMS = {
    "fixed": EngineSettings(dtype="float32", plan="fixed"),
    "planned": EngineSettings(dtype="float32"),
    "fixed, not recorded": EngineSettings(dtype="float32", plan="fixed", compile=False),
}


def family(name: str, dtype: torch.dtype) -> float | None:
    """The largest difference between kernels and operations over all rounds; None where there are no
    kernels."""
    from support.paged_target import BLOCK, build, one_pass

    target, _ = build(name, dtype)
    target.model.to("cuda")
    operations, kernels = (PagedModel(target, 40 * BLOCK, 128) for _ in range(2))
    operations.stack.paged = False
    if not kernels.stack.paged:
        return None
    generator = torch.Generator().manual_seed(0)
    position, worst = [0, 0, 0], 0.0
    for lengths in ROUNDS:
        tokens = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
        made = one_pass(list(zip(tokens, position, TABLES, strict=True)))
        parts = made.tokens_T, made.starts_R, made.lengths_R, made.tables_RB, BLOCK
        wanted, found = (
            m.read(Pass(*parts, torch.device("cuda"), dtype), None).logits_WV for m in (operations, kernels)
        )
        worst = max(worst, float((wanted - found).abs().max() / wanted.abs().max()))
        position = [p + n for p, n in zip(position, lengths, strict=True)]
    return worst


def answers(
    settings: EngineSettings, drafter: Path | None, prompts: list[tuple[int, ...]]
) -> tuple[list[list[int]], Engine]:
    """Greedy answers of 64 tokens at most, all asked at once."""
    engine = Engine("tiny", drafter, settings)
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=64, temperature=0))
        found[str(index)] = []
    while engine.has_work():
        for output in engine.step():
            found[output.request_id] += [event.token_id for event in output.events]
    return list(found.values()), engine


def main() -> None:
    """Check and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("drafters", type=Path, nargs="+", metavar="DRAFTER")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is there")
    from support.paged_target import FAMILIES

    families = {
        name: {str(t)[6:]: family(name, t) for t in (torch.float32, torch.bfloat16)} for name in FAMILIES
    }
    prompts = read_prompts("tiny", options.prompts)
    wanted, _ = answers(CPU, None, prompts)
    arms: dict[str, Any] = {}
    for drafter in (None, *options.drafters):
        for plan, settings in ARMS.items():
            if drafter is None and plan == "planned":
                continue
            found, engine = answers(settings, drafter, prompts)
            recorded = getattr(engine._models.model, "recorded", None)
            arms[f"{engine.info.algorithm}, {plan}"] = {
                "answers": len(found),
                "unlike_the_cpus": sum(a != b for a, b in zip(found, wanted, strict=True)),
                "accepted_length": 1 + engine.metrics.accepted / max(1, engine.metrics.rounds),
                "recorded_sizes": len(recorded._recordings) if recorded is not None else 0,
                "not_recorded_because": recorded.reason if recorded is not None else None,
            }
    print_result({"families": families, "arms": arms}, options.out)
    wrong = [
        n
        for n, found in families.items()
        if found["float32"] is not None and not found["float32"] < TOLERANCE
    ]
    wrong += [n for n, found in arms.items() if found["unlike_the_cpus"] or found["not_recorded_because"]]
    if wrong:
        raise SystemExit(f"different: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

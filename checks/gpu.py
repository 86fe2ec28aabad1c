"""What tests cannot show without a GPU, in one run of at most eight minutes.

    python -m checks.gpu --out checks/results/gpu.json
    python -m checks.gpu --small --out small.json      # the same parts with small models on a CPU, to try it

In this order: kernels against PyTorch operations for every family; greedy answers of the embedded pair, on
the device and on the CPU, and those of a tiny DeepSeek-V4; values and gradients of training's attention
against the CPU's; a training step; the sampler's share of a step; tokens per second without a drafter, with
fixed and with planned lengths. The last three are of the embedded pair grown to the shape of Qwen3-8B and its
drafter (`benchmarks/grown.py`), V = 151,936.

Every result is written as it comes, so a run that is cut off keeps what it has; what the time did not allow
is named. Exit code 1 where something differs that must not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine_load import answer_at_once, read_prompts, run_closed
from benchmarks.grown import grow_pair
from benchmarks.result_file import write_result
from checks.gpu_deepseek_v4 import deepseek_v4
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import TrainBatch
from draftkit.engine.compiled import compile_passes
from draftkit.engine.drawing import Drawing
from draftkit.engine.engine import Engine
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.passes import Pass
from draftkit.engine.plan import LengthPlanner
from draftkit.engine.round import ProposalBatch, verify_proposals
from draftkit.engine.settings import EngineSettings
from draftkit.ops.attention import block_attention, plan_blocks
from draftkit.ops.sampling import Sampling, row_settings
from draftkit.serve.pair import PACKAGED
from draftkit.settings import LossSettings
from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget
from draftkit.train.optim import new_optimizer, take_step
from draftkit.train.parallel import ParallelDrafter, World

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # random models of every family
TOLERANCE = 1e-4  # of float32, as a share of the largest number
ROUNDS = ([36, 2, 9], [1, 1, 1], [4, 1, 2], [6, 2, 4])  # tokens of each request
SETTINGS = {
    "T=1": Sampling(1.0),
    "T=0.7, top-p 0.9": Sampling(0.7, top_p=0.9),
    "T=0.7, top-k 20, top-p 0.8": Sampling(0.7, 20, 0.8),
}
LONGEST = 512  # tokens of a request of the grown pair
Found = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Run:
    """What the parts need to know: the device, and how large everything is."""

    device: torch.device
    small: bool

    @property
    def users(self) -> tuple[int, ...]:
        """Requests at a time."""
        return (1, 2) if self.small else (1, 4, 16, 64, 256)

    @cached_property
    def pair(self) -> tuple[TransformersTarget, BlockDrafter]:
        """The pair that speed is measured on."""
        target = load_target("tiny")
        drafter = open_drafter(PACKAGED["tiny"].folder, target)
        if not isinstance(drafter, BlockDrafter):
            raise SystemExit("the embedded drafter is no block drafter")
        return (target, drafter) if self.small else grow_pair(target, drafter)

    @cached_property
    def engines(self) -> dict[bool, Engine]:
        """Of that pair, with the drafter and without it."""
        target, drafter = self.pair
        settings = EngineSettings(max_length=LONGEST, max_running=max(self.users))
        return {
            drafting: Engine(target, drafter if drafting else None, settings) for drafting in (False, True)
        }

    def seconds(self, job: Callable[[], object], repeats: int = 5) -> float:
        """Median of some runs, after one that does not count."""
        taken = []
        for _ in range(repeats + 1):
            self.wait()
            began = time.perf_counter()
            job()
            self.wait()
            taken.append(time.perf_counter() - began)
        return median(taken[1:])

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def families(run: Run) -> Found:
    """The largest difference between the device's own passes and PyTorch operations, over all rounds."""
    from support.paged_target import FAMILIES, TABLES

    for name in ("qwen3", "gemma2") if run.small else FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            worst = _family(run, name, dtype, TABLES)
            limit = TOLERANCE if dtype == torch.float32 else 0.1
            found = {"difference": worst, "wrong": worst is not None and not worst < limit}
            yield f"{name}, {str(dtype)[6:]}", found


@torch.inference_mode()
def _family(run: Run, name: str, dtype: torch.dtype, tables: list[list[int]]) -> float | None:
    """None where there are no kernels for it."""
    from support.paged_target import BLOCK, build, one_pass

    target, _ = build(name, dtype)
    target.model.to(run.device)
    operations, own = (PagedModel(target, 40 * BLOCK, 128) for _ in range(2))
    operations.stack.paged = False
    if run.device.type == "cpu" and compile_passes(own) is not None:
        return None
    if run.device.type == "cuda" and not own.stack.paged:
        return None
    generator = torch.Generator().manual_seed(0)
    position, worst = [0, 0, 0], 0.0
    for lengths in ROUNDS:
        tokens = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
        made = one_pass(list(zip(tokens, position, tables, strict=True)))
        parts = made.tokens_T, made.starts_R, made.lengths_R, made.tables_RB, BLOCK
        wanted, found = (
            m.read(Pass(*parts, run.device, dtype), None).logits_WV.float() for m in (operations, own)
        )
        worst = max(worst, float((wanted - found).abs().max() / wanted.abs().max()))
        position = [p + n for p, n in zip(position, lengths, strict=True)]
    return worst


def answers(run: Run) -> Found:
    """Greedy answers of the embedded pair in float32 against PyTorch operations on the CPU."""
    prompts = read_prompts("tiny", 4 if run.small else 48)
    plain = EngineSettings(device="cpu", dtype="float32", compile=False)
    wanted = answer_at_once(Engine("tiny", None, plain), prompts, 64)
    own = EngineSettings(device=str(run.device), dtype="float32")
    for name, drafting, settings in (
        ("no drafter", False, own),
        ("fixed", True, replace(own, plan="fixed")),
        ("planned", True, own),
        ("fixed, PyTorch operations", True, replace(own, plan="fixed", compile=False)),
    ):
        engine = Engine("tiny", PACKAGED["tiny"].folder if drafting else None, settings)
        found = answer_at_once(engine, prompts, 64)
        unlike = sum(a != b for a, b in zip(found, wanted, strict=True))
        accepted = 1 + engine.metrics.accepted / max(1, engine.metrics.rounds)
        wrong = bool(unlike) or engine.compiled != settings.compile
        facts = {"answers": len(found), "unlike": unlike, "accepted_length": accepted}
        yield name, facts | {"compiled": engine.compiled, "wrong": wrong}


def attention(run: Run) -> Found:
    """Training's block attention and its gradients in float32, on the device and on the CPU."""
    blocks, gamma, keys, heads, kv_heads = (6, 3, 40, 4, 2) if run.small else (64, 7, 512, 32, 8)
    rng = torch.Generator().manual_seed(0)
    stops = (torch.arange(1, blocks + 1) * keys) // blocks
    starts, documents = torch.zeros_like(stops), torch.zeros_like(stops)
    for size in (16,) if run.small else (64, 128):
        rows = ((blocks * gamma, heads), *[(blocks * gamma, kv_heads)] * 2, *[(keys, kv_heads)] * 2)
        given = [torch.randn(*r, size, generator=rng) for r in rows]
        upstream = torch.randn(rows[0] + (size,), generator=rng)

        def made(device: torch.device, given: list[Tensor], upstream: Tensor, size: int) -> list[Tensor]:
            q, own_k, own_v, seen_k, seen_v = (t.to(device).requires_grad_() for t in given)
            bounds = (starts.to(device), stops.to(device), documents.to(device))
            plan = plan_blocks(*bounds, gamma, keys, size)
            out = block_attention(q, (own_k, own_v), (seen_k, seen_v), plan, size**-0.5)
            out.backward(upstream.to(device))
            return [t.cpu() for t in (out.detach(), *(x.grad for x in (q, own_k, own_v, seen_k, seen_v)))]

        pairs = zip(*(made(d, given, upstream, size) for d in (torch.device("cpu"), run.device)), strict=True)
        worst = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
        yield f"head size {size}", {"output, gradients": worst, "wrong": not max(worst) < 1e-3}


def training(run: Run) -> Found:
    """A step of the grown drafter in float32: seconds, drafted tokens that learn, and the loss."""
    _, drafter = run.pair
    rows, length, anchors = (1, 64, 4) if run.small else (2, 1024, 128)
    drafter = drafter.float().train()
    drafter.requires_grad_(True)
    for shared in (drafter.embed_tokens, drafter.lm_head):
        shared.requires_grad_(False)
    parallel = ParallelDrafter(drafter, World(0, 1, run.device), False, torch.float32)
    optimizer = new_optimizer(parallel, 1e-4, 0.0)
    hidden, layers = drafter.config.hidden_size, len(drafter.config.feature_layers)
    with run.device:
        tokens = torch.randint(0, 256, (rows, length))
        batch = TrainBatch(
            tokens_BT=tokens,
            loss_mask_BT=torch.ones_like(tokens, dtype=torch.bool),
            features_BTF=torch.randn(rows, length, layers * hidden),
            last_hidden_BTH=torch.randn(rows, length, hidden),
            document_BT=torch.zeros_like(tokens),
            positions_BT=torch.arange(length).expand(rows, -1),
            anchors_BA=torch.arange(anchors).expand(rows, -1) * (length // anchors),
            anchor_mask_BA=torch.ones(rows, anchors, dtype=torch.bool),
            domain_BA=torch.zeros(rows, anchors, dtype=torch.int64),
            domains=("all",),
        )
    losses: list[float] = []

    def step() -> None:
        losses.append(take_step(parallel, optimizer, [batch], LossSettings(), 1.0).loss)

    seconds = run.seconds(step, 3)
    falls = losses[-1] < losses[0]
    tokens_per_second = rows * anchors * drafter.gamma / seconds
    found = {"seconds": seconds, "drafted_tokens_per_second": tokens_per_second, "losses": losses}
    yield "step", found | {"wrong": not falls}


def sampling(run: Run) -> Found:
    """The sampler's time over that of sampler and target pass, for one token and for seven drafted ones."""
    from draftkit.engine.measure import pass_job

    models = run.engines[True]._models
    vocab, gamma = models.info.vocab_size, models.info.gamma
    for users in run.users:
        blocks = np.tile(np.arange(models.pool.blocks_for(LONGEST // 2)), (users, 1))
        for drafted in (0, gamma):
            rows = users * (drafted + 1)
            passed = run.seconds(pass_job(models, blocks, 128, rows, drafted + 1))
            logits = torch.randn(rows, vocab, device=run.device) * 3
            found: dict[str, Any] = {"pass_seconds": passed}
            for name, sampled in SETTINGS.items():
                taken = run.seconds(_sampler(logits, users, drafted, sampled), 3)
                found[name] = {"seconds": taken, "share": taken / (taken + passed)}
            yield f"{users} users, {drafted} drafted", found


def _sampler(logits: Tensor, users: int, drafted: int, sampled: Sampling) -> Callable[[], object]:
    settings = row_settings([sampled] * users)
    uniforms = np.random.default_rng(0).uniform(size=(users, drafted + 2))
    lengths, everyone = np.full(users, drafted), list(range(users))

    @torch.inference_mode()
    def job() -> object:
        drawing = Drawing(settings, uniforms[:, :drafted])
        rows = logits.unflatten(0, (users, drafted + 1))
        tokens = [drawing(rows[:, k].contiguous(), k) for k in range(drafted)]
        placed = torch.stack(tokens, 1) if tokens else logits.new_empty(users, 0, dtype=torch.int64)
        proposals = ProposalBatch(placed, drawing.drawn(), lengths, everyone if drafted else [])
        return verify_proposals(logits, None, proposals, settings, uniforms[:, -2:])

    return job


def arms(run: Run) -> Found:
    """Tokens per second of greedy answers: without a drafter, fixed and planned lengths."""
    prompts = [p for p in read_prompts("tiny", 48) if len(p) < LONGEST // 2]
    drafting = run.engines[True]
    planned = drafting._planner
    planners = {
        "no drafter": planned,
        "fixed": LengthPlanner(max(run.users), drafting.info.gamma),
        "planned": planned,
    }
    for users in run.users:
        speeds: dict[str, Any] = {}
        for name, planner in planners.items():
            engine = run.engines[name != "no drafter"]
            if engine is drafting:
                engine._planner = planner
            rounds = 4 if name == "planned" and users < 64 else 2  # the gate has something to learn
            loads = [run_closed(engine, prompts, users, users * rounds, 64) for _ in range(2)]
            speeds[name] = {"tokens_per_second": loads[1].speed, "accepted_length": loads[1].accepted_length}
        drafting._planner = planned
        best = max(speeds[name]["tokens_per_second"] for name in ("no drafter", "fixed"))
        yield (
            f"{users} users",
            speeds | {"planned_over_better": speeds["planned"]["tokens_per_second"] / best},
        )


PARTS: dict[str, Callable[[Run], Found]] = {
    "families": families,
    "answers": answers,
    "deepseek_v4": lambda run: deepseek_v4(run.device),
    "attention": attention,
    "sampling": sampling,
    "arms": arms,
    "training": training,  # the last one: it makes the drafter float32
}


def main() -> None:
    """Run all parts, print a line for each result, and write one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small models on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun after these")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("no GPU is there; --small tries the parts on a CPU")
    run = Run(torch.device("cpu" if options.small else "cuda"), options.small)
    began = time.perf_counter()
    result: dict[str, Any] = {"small": options.small, "left_out": []}
    wrong: list[str] = []
    for name in options.parts:
        part = PARTS[name](run)
        while time.perf_counter() - began < 60 * options.minutes:
            what, found = next(part, ("", {}))
            if not what:
                break
            result.setdefault(name, {})[what] = found
            wrong += [f"{name}: {what}"] if found.get("wrong") else []
            print(f"{time.perf_counter() - began:6.1f} s  {name}: {what}: {found}", flush=True)
            write_result(result, options.out)
        else:
            result["left_out"].append(name)
    write_result(result, options.out)
    if result["left_out"]:
        print(f"no time for: {', '.join(result['left_out'])}")
    if wrong:
        raise SystemExit(f"different: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

"""Memory and time of the sliced distillation loss against the same loss on whole fp32 logits and
probabilities.

One training step's loss and gradients for DSpark's mix (0.1 CE + 0.9 TV, Markov head): vocabulary 151,936,
512 anchors of 7 tokens, hidden size 256, rank 256, float32, CPU. Every arm runs in a process of its own; arms
alternate; peak extra memory is the peak resident size during loss and backward less what was resident before.
The third arm stops at logits and probabilities of both models: no loss and no gradients, so its time is no
comparison.

    python -m benchmarks.loss_memory --out benchmarks/results/loss_memory.json

Runs are added to those of the same setting that the file already holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from draftkit.draft.loss_terms import position_weights
from draftkit.draft.losses import Head, Rows, distillation_loss
from draftkit.settings import LossSettings

ARMS = ("sliced", "whole", "whole, forward only")
GAMMA = 7


def make_rows(vocabulary: int, anchors: int, hidden: int, rank: int) -> Rows:
    """Random rows; every anchor's tokens all count."""
    torch.manual_seed(0)
    count = anchors * GAMMA
    head = Head(torch.randn(vocabulary, hidden).mul_(0.1))
    return Rows(
        hidden_NH=torch.randn(count, hidden).requires_grad_(),
        head=head,
        markov=(
            torch.randn(count, rank).requires_grad_(),
            torch.randn(vocabulary, rank).mul_(0.02).requires_grad_(),
        ),
        target_hidden_NH=torch.randn(count, hidden),
        target_head=head,
        tokens_N=torch.randint(vocabulary, (count,)),
        grid_N=torch.arange(count),
        gamma=GAMMA,
        place_N=torch.arange(count),
    )


def whole_loss(rows: Rows, settings: LossSettings) -> Tensor:
    """The same number from whole tensors, by autograd."""
    logits, p = whole_forward(rows)
    log_q = torch.log_softmax(logits, -1)
    ce = -log_q.gather(1, rows.tokens_N[:, None])[:, 0]
    tv = (log_q.exp() - p).abs().sum(-1)
    return (
        position_weights(settings, GAMMA)[rows.grid_N % GAMMA] * (settings.ce * ce + settings.tv * tv)
    ).sum()


def whole_forward(rows: Rows) -> tuple[Tensor, Tensor]:
    """Draft logits and the target's probabilities, [N, V]."""
    assert rows.markov is not None
    weight = rows.target_head.weight_VH
    logits = rows.hidden_NH @ weight.T + rows.markov[0] @ rows.markov[1].T
    return logits, torch.softmax(rows.target_hidden_NH @ weight.T, -1)


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def run_arm(arm: str, rows: Rows) -> dict[str, float]:
    """Loss, seconds and peak extra memory of one step."""
    settings = LossSettings()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, loss = memory_mib("VmRSS"), torch.zeros(())
    began, cpu_began = time.perf_counter(), time.process_time()
    if arm == "sliced":
        loss = distillation_loss(rows, settings).loss
        loss.backward()
    elif arm == "whole":
        loss = whole_loss(rows, settings)
        loss.backward()
    else:
        with torch.no_grad():
            logits, p = whole_forward(rows)
            target = rows.target_hidden_NH @ rows.target_head.weight_VH.T
            q = torch.softmax(logits, -1)
        del logits, p, target, q
    return {
        "loss": float(loss.detach()),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "peak_mib": memory_mib("VmHWM") - before,
    }


def main() -> None:
    """Run the arms in turn and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--anchors", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", choices=ARMS, help="run this one here, and print its figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.arm:
        rows = make_rows(args.vocabulary, args.anchors, args.hidden, args.rank)
        # whatever is loaded once is loaded now
        run_arm("sliced", make_rows(1000, 16, args.hidden, args.rank))
        print(json.dumps(run_arm(args.arm, rows)))
        return
    setting = {
        "threads": args.threads,
        "torch": torch.__version__,
        "sizes": {k: getattr(args, k) for k in ("vocabulary", "anchors", "hidden", "rank")}
        | {"gamma": GAMMA},
    }
    earlier = json.loads(args.out.read_text("utf-8")) if args.out and args.out.exists() else {}
    same = all(earlier.get(name) == value for name, value in setting.items())
    runs: dict[str, list[dict[str, float]]] = earlier["runs"] if same else {arm: [] for arm in ARMS}
    for _, arm in track(
        [(i, arm) for i in range(args.repeats) for arm in ARMS], "arms", console=Console(stderr=True)
    ):
        command = [sys.executable, "-m", "benchmarks.loss_memory", *sys.argv[1:], "--arm", arm]
        runs[arm].append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        )
    pairs = list(zip(*runs.values(), strict=True))
    result = setting | {
        "runs": runs,
        "memory_ratio_to_whole": median(a["peak_mib"] / b["peak_mib"] for a, b, _ in pairs),
        "memory_ratio_to_whole_forward_only": median(a["peak_mib"] / c["peak_mib"] for a, _, c in pairs),
        "time_ratio_to_whole": median(a["seconds"] / b["seconds"] for a, b, _ in pairs),
        "cpu_time_ratio_to_whole": median(a["cpu_seconds"] / b["cpu_seconds"] for a, b, _ in pairs),
        "loss_difference": max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b, _ in pairs),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

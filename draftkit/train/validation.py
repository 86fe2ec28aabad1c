"""What a drafter is worth while it trains: simulated accepted length on held-out conversations, and real
decoding."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftkit.decode import decode
from draftkit.draft.drafter import Drafter, LossReport, TrainBatch
from draftkit.features.source import FeatureSource
from draftkit.ops.sampling import Sampling
from draftkit.progress import SILENT, Bar
from draftkit.settings import LossSettings
from draftkit.target.interface import Target
from draftkit.train.batches import BatchMaker, to_device
from draftkit.train.parallel import ParallelDrafter

DECODED_TOKENS = 64  # per prompt


@torch.no_grad()
def validate(
    parallel: ParallelDrafter, maker: BatchMaker, settings: LossSettings, bar: Bar = SILENT
) -> dict[str, float]:
    """Simulated accepted length by domain, their mean as "macro", and the loss, over all processes.

    The expected number of tokens of a round whose block follows the conversation: 1 + sum_k prod_{i <= k} (1
    - TV_i / 2), TV = |q - p|_1, averaged over the anchors whose whole block lies in the answer. `bar` counts
    samples.
    """
    device, domains = parallel.world.device, maker.domains
    lengths_D2 = torch.zeros(len(domains), 2, dtype=torch.float64, device=device)  # sums and counts
    loss_2 = torch.zeros(1, 2, dtype=torch.float64, device=device)
    parallel.drafter.eval()
    for done, cpu_batch in maker.validation():
        batch = to_device(cpu_batch, device)
        report = parallel.loss(batch, settings)
        loss_2 += torch.stack([report.loss_sum, report.weight_sum]).double()
        expected_N, domain_N = expected_lengths(report, batch, parallel.drafter.gamma)
        found = torch.stack([expected_N, torch.ones_like(expected_N)], 1)
        lengths_D2.index_add_(0, domain_N, found.double())
        bar.update(completed=done)
    parallel.drafter.train()
    totals = parallel.world.add_up(torch.cat([lengths_D2, loss_2])).tolist()
    lengths = {d: total / count for d, (total, count) in zip(domains, totals, strict=False) if count}
    loss, weight = totals[-1]
    return lengths | {"macro": sum(lengths.values()) / max(1, len(lengths)), "loss": loss / max(weight, 1e-9)}


def expected_lengths(report: LossReport, batch: TrainBatch, gamma: int) -> tuple[Tensor, Tensor]:
    """Expected accepted length of every anchor with a whole block, float [n], and its domain's number, int64
    [n]."""
    grid = report.accept_N.new_full((batch.anchors_BA.numel() * gamma,), float("nan"))
    grid = grid.index_copy(0, report.rows_N, report.accept_N).view(-1, gamma)
    whole = ~grid.isnan().any(-1)
    return 1 + grid[whole].cumprod(-1).sum(-1), batch.domain_BA.flatten()[whole]


def decoded_length(
    drafter: Drafter,
    target: Target,
    source: FeatureSource,
    indices: NDArray[np.int64],
    count: int,
    seed: int,
    bar: Bar = SILENT,
) -> float:
    """Tokens per round when `count` of the conversations' first prompts are answered at temperature 1 by
    `decode`.

    The last round of an answer is left out: the limit may have cut it. NaN when no answer had two rounds.
    """
    # the target's own stay one tensor
    frozen = {id(p): p for p in drafter.parameters() if not p.requires_grad}
    # drafting joins weights, which training must not see
    drafter = copy.deepcopy(drafter, frozen).to(target.device).eval()
    emitted = rounds = 0
    for index in indices[:: max(1, len(indices) // count)][:count].tolist():
        tokens_T, mask_T = source.text(index)
        prompt = tokens_T[: int(mask_T.int().argmax())].tolist()
        if prompt and len(prompt) + DECODED_TOKENS + drafter.gamma <= target.info.max_length:
            done = decode(target, drafter, prompt, Sampling(1.0), DECODED_TOKENS, seed + index)
            emitted += sum(r.emitted for r in done.rounds[:-1])
            rounds += len(done.rounds[:-1])
        bar.update(advance=1)
    return emitted / rounds if rounds else float("nan")

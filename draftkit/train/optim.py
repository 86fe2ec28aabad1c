"""One optimizer step: learning rate, token-correct gradients, clipping, and a guard against what is not
finite."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draftkit.draft.drafter import TrainBatch
from draftkit.errors import ConfigError
from draftkit.settings import GroupSettings, LossSettings, TrainSettings
from draftkit.train.batches import to_device
from draftkit.train.parallel import ParallelDrafter, to_whole


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all processes. `finite` is false when it was skipped; `stop` when some process
    wants to end.

    `loss` and `terms` are per unit of weight; `rows` counts the supervised drafted tokens.
    """

    loss: float
    terms: dict[str, float]
    rows: int
    grad_norm: float
    finite: bool
    stop: bool


def new_optimizer(
    parallel: ParallelDrafter,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = TrainSettings.betas,
    groups: Sequence[GroupSettings] = (),
) -> torch.optim.AdamW:
    """AdamW over what is trained, with `initial_lr` in every group. Raises ConfigError for a group that no
    parameter belongs to."""
    rest, found = dict(parallel.trained), []
    for group in groups:
        named = fnmatch.filter(rest, group.parameters)
        if not named:
            told = f"train.groups: {group.parameters!r} fits no parameter that is left; there are"
            raise ConfigError(f"{told} {', '.join(rest) or 'none'}")
        found.append(
            {
                "params": [rest.pop(name) for name in named],
                "lr": lr if group.lr is None else group.lr,
                "weight_decay": weight_decay if group.weight_decay is None else group.weight_decay,
            }
        )
    if rest:
        found.insert(0, {"params": list(rest.values()), "lr": lr, "weight_decay": weight_decay})
    made = [group | {"initial_lr": group["lr"]} for group in found]
    return torch.optim.AdamW(made, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def with_last(batches: Iterable[TrainBatch]) -> Iterator[tuple[TrainBatch, bool]]:
    """Each with whether it is the last one."""
    before: TrainBatch | None = None
    for batch in batches:
        if before is not None:
            yield before, False
        before = batch
    if before is not None:
        yield before, True


def lr_scale(share: float, warmup: float, cooldown: float) -> float:
    """Linear warm-up over the first `warmup` of the run, a cosine to zero over its last `cooldown` (1: after
    the warm-up)."""
    if share < warmup:
        return max(share / warmup, 0.01)
    start = max(warmup, 1 - cooldown)
    return 0.5 * (1 + math.cos(math.pi * max(0.0, share - start) / (1 - start)))


def take_step(
    parallel: ParallelDrafter,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[TrainBatch],
    loss: LossSettings,
    grad_clip: float,
    stop: bool = False,
) -> StepResult:
    """One step over the micro-batches of this process, which belongs to one step of all processes.

    Micro-batches are taken one after the other; the device holds one of them. The gradient is that of (sum of
    losses) / (sum of weights) over all tokens of all micro-batches and processes. Where it is not finite the
    step is skipped. The host waits for the device once. Every process must give the same number of
    micro-batches (at least one), and `stop` on any of them is seen by all.
    """
    device = parallel.world.device
    sums: dict[str, Tensor] = {}
    for waiting, last in with_last(batches):
        batch = to_device(waiting, device)
        report = parallel.loss(batch, loss, last)
        report.loss_sum.backward()
        found = {"loss": report.loss_sum.detach(), "weight": report.weight_sum, **report.sums}
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.double()
        rows = torch.tensor(len(report.rows_N), dtype=torch.float64, device=device)
        sums["rows"] = sums.get("rows", 0) + rows
    sums["stop"] = torch.tensor(float(stop), dtype=torch.float64, device=device)
    totals = parallel.world.add_up(torch.stack(list(sums.values())))
    names = list(sums)
    gradients = [p.grad for p in parallel.trained.values() if p.grad is not None]
    weight = totals[names.index("weight")].clamp_min(1e-9).float()
    for gradient in gradients:
        gradient.div_(weight)
    norm = to_whole(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(parallel.trained.values(), grad_clip, norm)
    values = torch.cat([totals, norm.double()[None]]).tolist()  # the one wait
    told = dict(zip([*names, "norm"], values, strict=True))
    finite = math.isfinite(told["loss"]) and math.isfinite(told["norm"]) and told["weight"] > 0
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    per_weight = {k: v / max(told["weight"], 1e-9) for k, v in told.items()}
    terms = {k: per_weight[k] for k in names if k not in ("loss", "weight", "rows", "stop")}
    return StepResult(per_weight["loss"], terms, int(told["rows"]), told["norm"], finite, told["stop"] > 0)

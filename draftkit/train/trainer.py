"""The training loop: batches, loss, AdamW, validation, checkpoints, and a log line for every step."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftkit.data.features import FeatureStore
from draftkit.draft.checkpoint import save_drafter
from draftkit.draft.drafter import Drafter, LossReport, LossSettings, TrainBatch
from draftkit.errors import DataError
from draftkit.train.batches import BatchSampler, Split, split_store, validation_batches
from draftkit.train.state import Position, load_state, save_state


@dataclass(frozen=True)
class TrainSettings:
    """How a drafter is trained. With `minutes` the run ends after that time, and the learning rate falls accordingly."""

    epochs: int = 10
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    anchors: int = 32
    lr: float = 6e-4
    warmup: float = 0.04
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    max_skipped: int = 20
    validation_share: float = 0.04
    validate_every: int = 200
    seed: int = 0
    loss: LossSettings = LossSettings()


@dataclass(frozen=True)
class TrainReport:
    """How a run ended: steps, seconds, skipped steps, and the best validation's accepted length by domain."""

    steps: int
    seconds: float
    skipped: int
    best: float
    accepted_len: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """What one line of progress shows."""

    step: int
    share: float  # of the run, 0..1
    seconds: float
    loss: float
    accepted_len: float | None


def train(
    store: FeatureStore,
    drafter: Drafter,
    out: Path,
    settings: TrainSettings,
    provenance: dict[str, Any],
    report: Callable[[Progress], None] = lambda progress: None,
) -> TrainReport:
    """Train `drafter` on `store` into `out/best` and `out/last`; a run that was interrupted goes on from `out/state`.

    Raises DataError when the store is too small, when losses stop being finite, and CheckpointError when `out/state`
    belongs to another run. On any interruption the state is saved before the exception goes on.
    """
    split = split_store(store, settings.validation_share, settings.seed)
    if not split.train:
        raise DataError(f"{store.folder}: {len(store)} conversations leave nothing to train on; generate more")
    sampler = BatchSampler(store, split.train, settings.batch_size, settings.anchors, settings.seed)
    trained = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    fingerprint = _fingerprint(store, drafter, settings)
    position = load_state(out / "state", drafter, optimizer, fingerprint) or Position(0, 0.0, 0.0, fingerprint)
    total = settings.steps or settings.epochs * sampler.per_epoch
    step, seconds, best, skipped = position.step, position.seconds, position.best, 0
    lengths: dict[str, float] = {}
    drafter.train()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        try:
            while (share := _share(settings, step, total, seconds)) < 1:
                began = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * lr_scale(share, settings.warmup)
                loss, finite = _step(drafter, optimizer, sampler.batch(step), settings)
                skipped = 0 if finite else skipped + 1
                if skipped > settings.max_skipped:
                    raise DataError(f"{skipped} steps in a row without a finite loss: lower train.lr or check the features")
                step += 1
                seconds += time.perf_counter() - began
                line: dict[str, Any] = {"step": step, "loss": loss, "lr": optimizer.param_groups[0]["lr"]}
                accepted = None
                if step % settings.validate_every == 0:
                    lengths = validate(drafter, store, split, settings)
                    accepted = lengths["macro"]
                    line["validation"] = lengths
                    if accepted > best:
                        best = accepted
                        save_drafter(drafter, out / "best", provenance | {"step": step, "validation": lengths}, torch.float32)
                    save_state(out / "state", drafter, optimizer, Position(step, seconds, best, fingerprint))
                log.write(json.dumps(line) + "\n")
                report(Progress(step, share, seconds, loss, accepted))
        except BaseException:
            save_state(out / "state", drafter, optimizer, Position(step, seconds, best, fingerprint))
            raise
        lengths = validate(drafter, store, split, settings)
        log.write(json.dumps({"step": step, "validation": lengths}) + "\n")
    note = provenance | {"step": step, "validation": lengths}
    save_drafter(drafter, out / "last", note, torch.float32)
    if lengths["macro"] >= best:
        best = lengths["macro"]
        save_drafter(drafter, out / "best", note, torch.float32)
    save_state(out / "state", drafter, optimizer, Position(step, seconds, best, fingerprint))
    return TrainReport(step, seconds, skipped, best, lengths)


def lr_scale(share: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of the run, then a cosine to zero."""
    if share < warmup:
        return max(share / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _share(settings: TrainSettings, step: int, total: int, seconds: float) -> float:
    by_time = seconds / (60 * settings.minutes) if settings.minutes else 0.0
    return max(by_time, step / total)


def _step(
    drafter: Drafter, optimizer: torch.optim.Optimizer, batch: TrainBatch, settings: TrainSettings
) -> tuple[float, bool]:
    """One optimizer step over all micro-batches, weighted by what counts in each; a non-finite one is skipped."""
    rows = len(batch.tokens_BT)
    size = settings.micro_batch_size or rows
    loss_sum = weight_sum = 0.0
    for start in range(0, rows, size):
        part = drafter.loss(_rows(batch, slice(start, start + size)), settings.loss)
        part.loss_sum.backward()
        loss_sum += float(part.loss_sum.detach())
        weight_sum += float(part.weight_sum)
    trained = [p for p in drafter.parameters() if p.requires_grad and p.grad is not None]
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad.div_(max(weight_sum, 1e-9))
    norm = nn.utils.clip_grad_norm_(trained, settings.grad_clip)
    finite = math.isfinite(loss_sum) and bool(torch.isfinite(norm)) and weight_sum > 0
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return loss_sum / max(weight_sum, 1e-9), finite


def _rows(batch: TrainBatch, part: slice) -> TrainBatch:
    tensors: dict[str, Any] = {name: value[part] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)  # every tensor has one entry per row


@torch.no_grad()
def validate(drafter: Drafter, store: FeatureStore, split: Split, settings: TrainSettings) -> dict[str, float]:
    """Simulated accepted length by domain, their mean as "macro", and the loss.

    The expected number of tokens of a round whose block follows the conversation: 1 + sum_k prod_{i <= k} (1 - TV_i),
    averaged over anchors whose whole block lies in the answer.
    """
    totals: dict[str, list[float]] = {}
    loss = weight = 0.0
    drafter.eval()
    for batch in validation_batches(store, split.validation, settings.batch_size, settings.anchors):
        out = drafter.loss(batch, settings.loss)
        loss, weight = loss + float(out.loss_sum), weight + float(out.weight_sum)
        for domain, value in zip(*_expected_lengths(out, batch, drafter.gamma), strict=True):
            totals.setdefault(domain, []).append(value)
    drafter.train()
    lengths = {domain: sum(v) / len(v) for domain, v in sorted(totals.items())}
    return lengths | {"macro": sum(lengths.values()) / max(1, len(lengths)), "loss": loss / max(weight, 1e-9)}


def _expected_lengths(out: LossReport, batch: TrainBatch, gamma: int) -> tuple[list[str], list[float]]:
    rows, anchors = batch.anchors_BA.shape
    accept = torch.full((rows * anchors * gamma,), float("nan")).index_copy(0, out.rows_N.cpu(), out.accept_N.cpu())
    grid = accept.view(rows, anchors, gamma)
    whole = ~grid.isnan().any(-1)
    values = 1 + grid.cumprod(-1).sum(-1)
    domains = [batch.domains[d] for d in batch.domain_BA.cpu()[whole].tolist()]
    return domains, values[whole].tolist()


def _fingerprint(store: FeatureStore, drafter: Drafter, settings: TrainSettings) -> str:
    """Changes when the data, the drafter or anything about the training but its length changes."""
    about = asdict(settings) | {"epochs": 0, "steps": 0, "minutes": 0}
    text = json.dumps([store.manifest.made_from(), asdict(drafter.config), about], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()

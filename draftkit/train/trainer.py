"""The training loop, top to bottom: batches, step, validation, checkpoints, log.

What is left to the other files: `batches` what a step sees, `optim` the step, `validation` what a drafter is
worth, `state` how a run goes on, `parallel` more than one process, `log` where numbers go.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftkit.draft.checkpoint import save_drafter
from draftkit.draft.drafter import Drafter
from draftkit.errors import DataError, Interrupted
from draftkit.features.source import FeatureSource
from draftkit.interrupt import noted_signals
from draftkit.progress import SILENT, Bar
from draftkit.settings import TrainSettings
from draftkit.target.interface import Target
from draftkit.train.arithmetic import arithmetic
from draftkit.train.batches import BatchMaker, Cut, Split, split_source, steps_from
from draftkit.train.log import TrainLog
from draftkit.train.optim import lr_scale, new_optimizer, take_step
from draftkit.train.parallel import ParallelDrafter, World
from draftkit.train.state import Position, load_state, save_state
from draftkit.train.validation import decoded_length, validate

SIGTERM_CODE = 143
# of finished drafters, as servers load them: half as long to read; states stay float32
SAVED_DTYPE = torch.bfloat16
# A run may go on with another value of these: they change how long it is, how it is cut, or what is told.
FREE = {"epochs", "steps", "minutes", "row_tokens", "micro_batch_size", "shard", "recompute", "max_skipped"}
FREE |= {"validate_every", "decode_prompts", "patience", "keep_checkpoints", "track"}


@dataclass(frozen=True)
class TrainReport:
    """How a run ended: steps, seconds, skipped steps, and the best and the last validation's accepted
    length."""

    steps: int
    seconds: float
    skipped: int
    best: float
    accepted_len: dict[str, float]
    stopped_early: bool


@dataclass(frozen=True)
class Progress:
    """What one line of progress shows."""

    step: int
    share: float  # of the run, 0..1
    seconds: float
    loss: float
    accepted_len: float | None


def train(
    source: FeatureSource,
    drafter: Drafter,
    target: Callable[[], Target],
    out: Path,
    settings: TrainSettings,
    provenance: dict[str, Any],
    world: World,
    report: Callable[[Progress], None] = lambda progress: None,
    accepted: Callable[[], None] = lambda: None,
    start: str = "",
    continued: bool = False,
    validation: FeatureSource | None = None,
    bar: Bar = SILENT,
) -> TrainReport:
    """Train `drafter` on `source` into `out/best`, `out/last` and `out/checkpoints`; a run that was
    interrupted goes on from `out/state`, also with another number of processes. `accepted` is called once in
    the first process, when nothing that lies in `out` is against this run. `target` loads the model that
    answers `decode_prompts`, in a run of one process. `start` says how the weights of step 0 were made, which
    a state must agree with; a drafter that is `continued` is validated before the first step, so that `best`
    is never worse than it was. `validation` holds the samples to validate on; without it a share of `source`
    is set aside. `bar` shows how far a validation is; `report` is told each step.

    Raises DataError when the source is too small or when losses stop being finite, CheckpointError when
    `out/state` belongs to another run, and ConfigError for a tracker that is not installed. SIGINT and
    SIGTERM end the run after a step, in all processes, with the state saved; one that comes after the last
    step, when everything is saved.
    """
    if validation is None:
        split, aside = split_source(source, settings.validation_share, settings.seed), source
    else:
        split, aside = Split(np.arange(len(source)), np.arange(len(validation))), validation
        start = f"{start} validated on {validation.made_from()}"
    if not len(split.train):
        raise DataError(f"{source.name}: {len(source)} samples leave nothing to train on; generate more")
    cut = Cut(settings.row_tokens, settings.micro_batch_size, world.rank, world.size)
    sizes = settings.batch_size, settings.anchors, settings.seed, cut
    maker = BatchMaker(source, split.train, *sizes, drafter.needs_target(settings.loss))
    held_out = BatchMaker(aside, split.validation, *sizes)
    fingerprint = _fingerprint(source, drafter, settings, start)
    compute = getattr(torch, settings.dtype)
    parallel = ParallelDrafter(drafter, world, settings.shard, compute)
    optimizer = new_optimizer(parallel, settings.lr, settings.weight_decay, settings.betas, settings.groups)
    drafter.recompute = settings.recompute
    out.mkdir(parents=True, exist_ok=True)
    at = load_state(out / "state", parallel, optimizer, fingerprint) or Position(
        0, 0.0, 0.0, 0, 0, fingerprint
    )
    if world.first:
        accepted()
    model = functools.cache(target)
    total = settings.steps or settings.epochs * maker.per_epoch
    in_a_row = 0  # skipped steps
    drafter.train()

    def check(step: Position) -> tuple[Position, dict[str, Any]]:
        """Validate, and keep the drafter where it is worth it. The state is saved once the log has the step:
        a kill between the two loses no line."""
        with bar.part("validate", len(held_out.indices)) as part:
            lengths: dict[str, Any] = validate(parallel, held_out, settings.loss, part)
        whole = parallel.whole()
        better = lengths["macro"] > step.best
        if world.first:
            if settings.decode_prompts and world.size == 1:
                count, seed = settings.decode_prompts, settings.seed
                with bar.part("answer validation prompts", min(count, len(split.validation))) as part:
                    decoded = decoded_length(whole, model(), aside, split.validation, count, seed, part)
                lengths |= {"decoded": decoded}
            note = provenance | {"step": step.step, "validation": lengths}
            _keep_numbered(whole, out / "checkpoints", note, settings.keep_checkpoints)
            if better:
                save_drafter(whole, out / "best", note, SAVED_DTYPE)
        return replace(
            step, best=max(step.best, lengths["macro"]), stale=0 if better else step.stale + 1
        ), lengths

    with (
        arithmetic(compute, world.device),
        TrainLog(out, at.step, settings.track, provenance, world.first) as log,
        noted_signals() as signalled,
        closing(steps_from(maker, at.step, world.device)) as steps,
    ):
        lengths: dict[str, Any] | None = None
        if continued and at.step == 0:
            at, lengths = check(at)
            log.write(0, {"validation": lengths})
            save_state(out / "state", parallel, optimizer, at)
        try:
            while (share := _share(settings, at, total, world)) < 1 and not _tired(settings, at):
                began = time.perf_counter()
                scale = lr_scale(share, settings.warmup, settings.cooldown)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * scale
                done = take_step(
                    parallel, optimizer, next(steps), settings.loss, settings.grad_clip, signalled() > 0
                )
                in_a_row = 0 if done.finite else in_a_row + 1
                if in_a_row > settings.max_skipped:
                    raise DataError(
                        f"{in_a_row} steps in a row without a finite loss: lower train.lr or check the "
                        f"features"
                    )
                seconds = time.perf_counter() - began
                at = replace(
                    at, step=at.step + 1, seconds=at.seconds + seconds, skipped=at.skipped + (not done.finite)
                )
                line: dict[str, Any] = {
                    "loss": done.loss,
                    **done.terms,
                    "grad_norm": done.grad_norm,
                    "lr": settings.lr * scale,
                }
                line |= {"tokens_per_s": done.rows / seconds, "skipped": at.skipped}
                lengths = None
                if at.step % settings.validate_every == 0:
                    at, lengths = check(at)
                    line["validation"] = lengths
                log.write(at.step, line)
                if lengths is not None:
                    save_state(out / "state", parallel, optimizer, at)
                if world.first:
                    report(
                        Progress(at.step, share, at.seconds, done.loss, lengths["macro"] if lengths else None)
                    )
                if done.stop:
                    raise Interrupted(signalled() or SIGTERM_CODE)
        except Interrupted:
            save_state(out / "state", parallel, optimizer, at)
            raise
        if lengths is None:
            at, lengths = check(at)
            log.write(at.step, {"validation": lengths})
            save_state(out / "state", parallel, optimizer, at)
        note = provenance | {"step": at.step, "validation": lengths}
        whole = parallel.whole()
        if world.first:
            save_drafter(whole, out / "last", note, SAVED_DTYPE)
            if not (out / "best").exists():  # no validation was above zero
                save_drafter(whole, out / "best", note, SAVED_DTYPE)
    return TrainReport(at.step, at.seconds, at.skipped, at.best, lengths, _tired(settings, at))


def _share(settings: TrainSettings, at: Position, total: int, world: World) -> float:
    """How much of the run is over, the same in all processes."""
    by_time = world.from_first(at.seconds) / (60 * settings.minutes) if settings.minutes else 0.0
    return max(by_time, at.step / total)


def _tired(settings: TrainSettings, at: Position) -> bool:
    return settings.patience is not None and at.stale >= settings.patience


def _keep_numbered(drafter: Drafter, folder: Path, note: dict[str, Any], keep: int) -> None:
    """Save `step-000200` and so on, and remove all but the newest `keep`."""
    if keep:
        save_drafter(drafter, folder / f"step-{note['step']:06d}", note, SAVED_DTYPE)
    for old in sorted(folder.glob("step-*"))[: -keep or None]:
        shutil.rmtree(old)


def _fingerprint(source: FeatureSource, drafter: Drafter, settings: TrainSettings, start: str) -> str:
    """Changes when the data, the drafter or anything that decides the steps changes."""
    about = {k: v for k, v in asdict(settings).items() if k not in FREE}
    if not settings.groups:  # states of before there were groups
        del about["groups"]
    if settings.loss.average == "tokens":  # and before there was a choice
        del about["loss"]["average"]
    text = json.dumps(
        [source.made_from(), asdict(drafter.config), about, start], sort_keys=True, default=list
    )
    return hashlib.sha256(text.encode()).hexdigest()

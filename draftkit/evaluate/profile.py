"""Measuring a step: the engine's own target pass and drafter on this machine, over tokens, requests and context.

Shapes: R requests, T tokens in the pass, V vocabulary, F features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import Drafter
from draftkit.engine.compiled import CompiledPasses
from draftkit.engine.fast_drafter import FastDrafter
from draftkit.engine.fast_model import FastModel, unsupported
from draftkit.engine.passes import Pass
from draftkit.errors import ScheduleError
from draftkit.evaluate.run import environment
from draftkit.ops.sampling import Sampling, processed_probs, sample
from draftkit.schedule.step_rate_table import Measured, StepRateTable
from draftkit.target.transformers import TransformersTarget

BLOCK_SIZE = 16
SAMPLING = Sampling(1.0)


@dataclass(frozen=True)
class ProfileSettings:
    """What to measure: every number of tokens per pass at every context length, and drafting for so many requests;
    `repeats` rounds over all points, each in another order, so that a slow minute does not fall on one point."""

    tokens: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    contexts: tuple[int, ...] = (64, 256)
    requests: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    tokens_per_request: int = 4
    repeats: int = 9


def profile_settings(
    tokens: Sequence[int] | None, contexts: Sequence[int] | None, repeats: int
) -> ProfileSettings:
    """Settings with some numbers of tokens or contexts replaced. Raises ScheduleError for one below 1."""
    base = ProfileSettings(repeats=repeats)
    for name, values in (("tokens", tokens), ("context", contexts)):
        if values and min(values) < 1:
            raise ScheduleError(f"profile: {name} {min(values)}; must be at least 1")
    return replace(
        base,
        tokens=tuple(sorted(set(tokens or base.tokens))),
        contexts=tuple(sorted(set(contexts or base.contexts))),
    )


def profile(
    target: TransformersTarget,
    drafter: Drafter | None,
    drafter_fingerprint: str,
    settings: ProfileSettings,
    tick: Callable[[], None] = lambda: None,
) -> StepRateTable:
    """Medians over the repeats; `tick` is called after every measurement. Passes are the compiled ones where they can run.

    A pass of n tokens holds ceil(n / tokens_per_request) requests. It includes the sampling distribution of every row.
    Drafting includes writing the context of one committed token per request and drawing the proposal. Raises ScheduleError
    for a target or drafter that the engine's forward cannot run.
    """
    reason = unsupported(target)
    if reason or not isinstance(drafter, BlockDrafter | None):
        raise ScheduleError(f"profile: {reason or 'only block drafters (DSpark, DFlash) can be measured'}")
    longest = max(settings.contexts)
    room = -(-(longest + max(settings.tokens) + 2 * BLOCK_SIZE) // BLOCK_SIZE)  # blocks per request
    most = max(-(-max(settings.tokens) // settings.tokens_per_request), *settings.requests)
    slots = most * room * BLOCK_SIZE
    length = longest + max(settings.tokens) + 2 * BLOCK_SIZE
    if length > target.info.max_length:
        raise ScheduleError(
            f"profile: contexts up to {longest} need {length} positions, the target has {target.info.max_length}; "
            "choose shorter contexts"
        )
    middle = settings.contexts[len(settings.contexts) // 2]
    tables_RB = np.arange(most * room).reshape(most, room)
    model = FastModel(target, slots, length)
    jobs: dict[tuple[str, int, int], Callable[[], object]] = {}
    for context in settings.contexts:
        for count in settings.tokens:
            jobs["pass", context, count] = _target_job(model, tables_RB, context, count, settings.tokens_per_request)
    fast = FastDrafter(drafter, slots, length) if drafter is not None else None
    compiled = model.embedding.dtype == torch.float32 and CompiledPasses(model, fast).wait()
    if drafter is not None and fast is not None:
        for requests in settings.requests:
            jobs["draft", middle, requests] = _draft_job(fast, drafter, tables_RB, middle, requests)
    seconds = _measure(jobs, settings.repeats, tick)
    values = {name: median(found) for name, found in seconds.items()}
    spreads = [float(np.subtract(*np.percentile(found, [75, 25]))) / median(found) for found in seconds.values()]
    env = environment()
    draft_seconds = tuple(values["draft", middle, r] for r in settings.requests) if drafter is not None else (0.0,)
    return StepRateTable(
        contexts=settings.contexts,
        tokens=settings.tokens,
        pass_seconds=tuple(tuple(values["pass", c, n] for n in settings.tokens) for c in settings.contexts),
        draft_requests=settings.requests if drafter is not None else (1,),
        draft_seconds=draft_seconds,
        measured=Measured(
            target=target.info.name,
            target_fingerprint=target.info.fingerprint,
            drafter_fingerprint=drafter_fingerprint,
            device=str(env["device"]),
            threads=int(env["threads"]),
            repeats=settings.repeats,
            tokens_per_request=settings.tokens_per_request,
            spread=median(spreads),
            clock="processor time" if _clock() is time.process_time else "wall clock",
            passes="compiled" if compiled else "PyTorch operations",
        ),
    )


def _clock() -> Callable[[], float]:
    """With one thread processor time, which is the pass's own also while others use the machine; else the wall clock."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _measure(
    jobs: dict[tuple[str, int, int], Callable[[], object]], repeats: int, tick: Callable[[], None]
) -> dict[tuple[str, int, int], list[float]]:
    rng, clock = np.random.default_rng(0), _clock()
    names = list(jobs)
    for job in jobs.values():  # lazy set-up and first touch of memory
        job()
    seconds: dict[tuple[str, int, int], list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for index in rng.permutation(len(names)):
            began = clock()
            jobs[names[index]]()
            seconds[names[index]].append(clock() - began)
            tick()
    return seconds


def _target_job(model: FastModel, tables_RB: np.ndarray, context: int, count: int, each: int) -> Callable[[], object]:
    lengths_R = np.array([len(part) for part in np.array_split(np.arange(count), -(-count // each))])
    starts_R = np.full(len(lengths_R), context)
    tokens_T = np.arange(count) % 100

    def job() -> Tensor:
        step = Pass(tokens_T, starts_R, lengths_R, tables_RB[: len(lengths_R)], BLOCK_SIZE, _cpu(), model.embedding.dtype)
        return processed_probs(model.read(step, None).logits_WV, SAMPLING)

    return job


def _draft_job(
    fast: FastDrafter, drafter: BlockDrafter, tables_RB: np.ndarray, context: int, requests: int
) -> Callable[[], object]:
    config, dtype = fast.config, fast.embedding.dtype
    block_T = np.full((requests, config.block_size), config.mask_token_id)
    block_T[:, 0] = 1
    starts_R, tables = np.full(requests, context), tables_RB[:requests]
    features_TF = torch.zeros(requests, len(config.feature_layers) * config.hidden_size, dtype=dtype)
    uniforms_RG = torch.rand(requests, drafter.gamma, dtype=torch.float64)

    def choose(logits_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
        probs_RV = processed_probs(logits_RV, SAMPLING)
        return sample(probs_RV, uniforms_RG[:, k]), probs_RV

    def job() -> object:
        ones_R = np.ones(requests, np.int64)
        read = Pass(block_T[:, 0], starts_R - 1, ones_R, tables, BLOCK_SIZE, _cpu(), dtype)
        fast.extend(read, features_TF, torch.zeros(requests, dtype=torch.int64))
        step = Pass(
            block_T.ravel(), starts_R, ones_R * config.block_size, tables, BLOCK_SIZE, _cpu(), dtype, block=True
        )
        return fast.draft(step, torch.from_numpy(block_T[:, 0].copy()), choose)

    return job


def _cpu() -> torch.device:
    return torch.device("cpu")


def plot_step_rate(table: StepRateTable, path: Path) -> None:
    """Steps per second over tokens in the pass, one line per context, and the drafter's seconds beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for context, row in zip(table.contexts, table.pass_seconds, strict=True):
        left.plot(table.tokens, [1 / s for s in row], marker="o", label=f"{context} tokens of context")
    left.set(xscale="log", xlabel="tokens in the target pass", ylabel="steps per second", ylim=(0, None))
    right.plot(table.draft_requests, [1e3 * s for s in table.draft_seconds], marker="o", label="drafting")
    right.set(xscale="log", xlabel="requests", ylabel="milliseconds", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_title(f"{table.measured.target} on {table.measured.device}, {table.measured.threads} threads", fontsize=9)
    figure.savefig(path, dpi=120)


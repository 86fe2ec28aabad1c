"""Measuring a step: the engine's own target pass and drafter on this machine, over tokens, requests and
context.

Shapes: R requests, B blocks per request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from draftkit.draft.drafter import Drafter
from draftkit.engine.compiled import compile_models
from draftkit.engine.measure import Job, draft_job, pass_job, timed
from draftkit.engine.memory import available_bytes, bytes_per_position
from draftkit.engine.models import Models, build_models
from draftkit.engine.paged_model import unsupported
from draftkit.engine.settings import EngineSettings
from draftkit.errors import ScheduleError
from draftkit.evaluate.run import environment
from draftkit.output import save_figure
from draftkit.schedule.step_rate_table import Measured, StepRateTable
from draftkit.target.transformers import TransformersTarget

BLOCK_SIZE = 16
Name = tuple[str, int, int]  # "pass" or "draft", context, tokens or requests


@dataclass(frozen=True)
class ProfileSettings:
    """What to measure: every number of tokens per pass at every context length, and drafting for so many
    requests; `repeats` rounds over all points, each in another order, so that a slow minute does not fall on
    one point."""

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
    """Medians over the repeats; `tick` is called after every measurement. Passes are the compiled ones where
    they can run.

    A pass of n tokens holds ceil(n / tokens_per_request) requests; the drafter reads it, too. Proposals are
    greedy, and nothing is sampled: an engine that starts without a file measures the same. Raises
    ScheduleError for a target that the lean forward cannot run, for contexts that are too long for it, and
    for more than fits the memory.
    """
    if reason := unsupported(target):
        raise ScheduleError(f"profile: {reason}")
    longest = max(settings.contexts) + settings.tokens_per_request
    if longest > target.info.max_length:
        raise ScheduleError(
            f"profile: contexts up to {max(settings.contexts)} need {longest} positions, the target has "
            f"{target.info.max_length}; choose shorter contexts"
        )
    most = max(-(-max(settings.tokens) // settings.tokens_per_request), *settings.requests)
    room = available_bytes(target.device)
    gamma = drafter.gamma if drafter is not None else 0
    positions = most * -(-(longest + gamma + 1) // BLOCK_SIZE) * BLOCK_SIZE
    if positions * bytes_per_position(target, drafter) > room:
        raise ScheduleError(
            f"profile: {max(settings.tokens)} tokens per pass after {max(settings.contexts)} of context "
            f"need more than "
            f"the {room / 2**30:.1f} GiB that are there for keys and values; choose fewer"
        )
    sizes = EngineSettings(max_running=most, max_length=longest, kv_bytes=room, block_size=BLOCK_SIZE)
    models = build_models(target, drafter, sizes)
    compiled = compile_models(models)
    jobs, middle = _jobs(models, settings, most)
    clock = _clock(models.device)
    for job in jobs.values():  # lazy set-up, recordings, first touch of memory
        job()
    seconds = timed(jobs, settings.repeats, clock, tick)
    values = {name: median(found) for name, found in seconds.items()}
    spreads = [
        float(np.subtract(*np.percentile(found, [75, 25]))) / median(found) for found in seconds.values()
    ]
    env = environment(models.device)
    draft_seconds = (
        tuple(values["draft", middle, r] for r in settings.requests) if drafter is not None else (0.0,)
    )
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
            clock="processor time" if clock is time.process_time else "wall clock",
            passes="compiled" if compiled else "PyTorch operations",
        ),
    )


def _clock(device: torch.device) -> Callable[[], float]:
    """On a CPU, with one thread, processor time, which is the pass's own also while others use the machine;
    else the wall clock."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _jobs(models: Models, settings: ProfileSettings, most: int) -> tuple[dict[Name, Job], int]:
    """What is to be measured, by kind, context and tokens or requests; and the context that drafting is
    measured at."""
    middle = settings.contexts[len(settings.contexts) // 2]
    tables_RB = np.arange(models.pool.num_blocks).reshape(most, -1)  # every request has blocks of its own
    jobs: dict[Name, Job] = {}
    for context in settings.contexts:
        for tokens in settings.tokens:
            jobs["pass", context, tokens] = pass_job(
                models, tables_RB, context, tokens, settings.tokens_per_request
            )
    if models.drafter is not None:
        for requests in settings.requests:
            jobs["draft", middle, requests] = draft_job(models, models.drafter, tables_RB[:requests], middle)
    return jobs, middle


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
    left.set_title(
        f"{table.measured.target} on {table.measured.device}, {table.measured.threads} threads", fontsize=9
    )
    save_figure(figure, path)

"""What a step costs on this machine: seconds of target passes and of drafting, timed as the engine runs them.

An engine measures for about a second before its first request; `draftkit profile` measures more points for
longer, with the same functions.

Shapes: R requests, B blocks per request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from statistics import median
from typing import TypeVar

import numpy as np
import torch

from draftkit.engine.drawing import Drawing
from draftkit.engine.graphs import sizes
from draftkit.engine.hf_model import HFModel
from draftkit.engine.kv_cache import BlockTable
from draftkit.engine.models import Models, PagedDrafter
from draftkit.engine.passes import LONG_QUERY, Pass
from draftkit.errors import ServeError
from draftkit.ops.sampling import Sampling, row_settings
from draftkit.schedule.step_rate import StepRate

_SECONDS = 1.0  # of the measurement at the start of an engine, in all
_CONTEXT = 128  # tokens in memory before the passes
_REPEATS = 5
_AT_LEAST = 16  # sizes up to here are measured however long it takes: one request's round is among them
Job = Callable[[], None]
Name = TypeVar("Name")


def pass_job(models: Models, tables_RB: np.ndarray, context: int, tokens: int, each: int) -> Job:
    """A target pass of so many tokens, `each` per request, after `context` others; the drafter reads it,
    too."""
    lengths_R = np.array([len(part) for part in np.array_split(np.arange(tokens), -(-tokens // each))])
    starts_R, tokens_T = (
        np.full(len(lengths_R), context),
        np.arange(tokens) % min(100, models.info.vocab_size),
    )

    @torch.inference_mode()
    def run() -> None:
        step = Pass(
            tokens_T,
            starts_R,
            lengths_R,
            tables_RB[: len(lengths_R)],
            models.pool.block_size,
            models.device,
            models.dtype,
        )
        read = models.model.read(step, None, models.feature_layers)
        if models.drafter is not None and read.features_TF is not None:
            models.drafter.extend(step, read.features_TF, step.tokens)
        wait(models)

    return run


def draft_job(
    models: Models, drafter: PagedDrafter, tables_RB: np.ndarray, context: int, greedy: bool = True
) -> Job:
    """Proposals for the requests of these tables, after `context` tokens; not `greedy`: as for sampled
    requests."""
    ones_R, size = np.ones(len(tables_RB), np.int64), models.pool.block_size
    wanted, anchors = (
        drafter.drafting_pass(ones_R),
        torch.ones(len(ones_R), dtype=torch.int64, device=models.device),
    )
    starts_R, lengths_R = ones_R * (context + wanted.first), ones_R * wanted.tokens_RP.shape[1]
    settings_R, uniforms_RG = (
        row_settings([Sampling(1.0)]).repeat(len(ones_R)),
        np.full((len(ones_R), drafter.gamma), 0.5),
    )

    @torch.inference_mode()
    def run() -> None:
        tokens_T = wanted.tokens_RP.ravel()
        step = Pass(tokens_T, starts_R, lengths_R, tables_RB, size, models.device, models.dtype, wanted.block)
        drafter.draft(step, anchors, None if greedy else Drawing(settings_R, uniforms_RG))
        wait(models)

    return run


def timed(
    jobs: Mapping[Name, Job],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Seconds of each job, which has run before, `repeats` times: in rounds over all, each in another order,
    so that a slow minute does not fall on one of them. `tick` is called after every run."""
    rng, names = np.random.default_rng(0), list(jobs)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for index in rng.permutation(len(names)):
            began = clock()
            jobs[names[index]]()
            seconds[names[index]].append(clock() - began)
            tick()
    return seconds


def measure_step_rate(models: Models, drafter: PagedDrafter, max_running: int) -> StepRate:
    """Medians over sizes 1, 2, 4, ...: up to all that `max_running` requests may need, as far as the time
    reaches, and to 16 however long it takes. `drafter` is the models'. Raises ServeError when too few blocks
    are free to write to."""
    with _borrowed(models) as blocks:
        context = 0 if isinstance(models.model, HFModel) else _context(models)  # that one has no caches yet

        def read(tokens: int) -> Job:
            width = models.info.gamma + 1
            return pass_job(models, _shared(blocks, -(-tokens // width)), context, tokens, width)

        def draft(requests: int) -> Job:
            return draft_job(models, drafter, _shared(blocks, requests), _context(models))

        tokens, pass_seconds = _curve(read, max_running * (models.info.gamma + 1))
        requests, draft_seconds = _curve(draft, max_running)
    return StepRate(tokens, pass_seconds, requests, draft_seconds)


def warm_up(models: Models, max_running: int, step_tokens: int) -> None:
    """Compile kernels and record passes of all sizes, so that no request waits for it; raises as
    `measure_step_rate`."""
    drafter, width = models.drafter, models.info.gamma + 1
    with _borrowed(models, step_tokens) as blocks:
        for tokens in sizes(max_running * width):
            pass_job(models, _shared(blocks, -(-tokens // width)), _context(models), tokens, width)()
        if drafter is not None:
            for requests, greedy in product(sizes(max_running), (True, False)):
                draft_job(models, drafter, _shared(blocks, requests), _context(models), greedy)()
        prompt = min(step_tokens, models.info.max_length - 1)
        for tokens in (prompt, 1 + min(LONG_QUERY, prompt)):  # two kinds of kernels, see `PagedPass.of`
            pass_job(models, _shared(blocks, 1), 0, min(tokens, prompt), prompt)()


def wait(models: Models) -> None:
    """Until a GPU has done what it was given; nothing to wait for on a CPU."""
    if models.device.type == "cuda":
        torch.cuda.synchronize(models.device)


def _curve(job: Callable[[int], Job], largest: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Sizes and seconds. More tokens never cost less: that is noise."""
    jobs: dict[int, Job] = {}
    size, began = 1, time.perf_counter()
    taken = 0.0  # by one run of each: the first of a size may compile or reserve memory
    while size == 1 or (size <= largest and (size <= _AT_LEAST or taken < _SECONDS / 4)):
        jobs[size] = job(size)
        jobs[size]()
        taken = time.perf_counter() - began
        size *= 2
    repeats = min(max(int(_SECONDS / 4 / max(taken, 1e-9)), 1), _REPEATS)
    seconds = np.maximum.accumulate([median(found) for found in timed(jobs, repeats).values()])
    return tuple(jobs), tuple(seconds.tolist())


@contextmanager
def _borrowed(models: Models, tokens: int = 0) -> Iterator[list[int]]:
    """Blocks to write to, for so many tokens at least."""
    table, needed = BlockTable(), _context(models) + models.info.gamma + 1
    if not models.pool.grow(table, max(needed, min(tokens, models.info.max_length))):
        raise ServeError("no memory is free to measure in; do it before requests come")
    try:
        yield table.blocks
    finally:
        models.forget(table.blocks[0])
        models.pool.release(table)


def _context(models: Models) -> int:
    """Tokens before a pass; after the longest request there is room for a proposal."""
    return min(_CONTEXT, models.info.max_length - 1)


def _shared(blocks: list[int], requests: int) -> np.ndarray:
    """Tables [R, B] of requests that all use the same blocks: only the time matters."""
    return np.tile(np.array(blocks), (requests, 1))

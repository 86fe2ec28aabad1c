"""A short measurement of what a step costs on this machine, for planning: passes of the target, and drafting.

`draftkit profile` measures more points for longer; this one takes about a second at the start of an engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from draftkit.engine.graphs import sizes
from draftkit.engine.kv_cache import BlockTable
from draftkit.engine.models import Models, PagedDrafter
from draftkit.engine.passes import LONG_QUERY, Pass
from draftkit.engine.slow_model import SlowModel
from draftkit.errors import ServeError
from draftkit.schedule.step_rate import StepRate

_SECONDS = 0.5  # for each of the two tables
_CONTEXT = 128  # tokens in memory behind which the passes read
_REPEATS = 5
_AT_LEAST = 16  # sizes up to here are measured however long it takes: one request's round is among them


def measure_step_rate(models: Models, drafter: PagedDrafter, max_running: int) -> StepRate:
    """Seconds by tokens of a pass, and by requests of a drafting; sizes double until half a second is used up, up to 16
    however long it takes.

    `drafter` is the models'. The passes write to blocks that are borrowed from the pool. Raises ServeError when too few
    are free.
    """
    largest = max_running * (models.info.gamma + 1)
    with _borrowed(models) as blocks:
        tokens, pass_seconds = _measure(largest, lambda n: _read(models, blocks, n))
        requests, draft_seconds = _measure(max_running, lambda n: _draft(models, drafter, blocks, n))
    return StepRate(tokens, pass_seconds, requests, draft_seconds)


def can_measure(models: Models) -> bool:
    """Whether enough blocks are free for `measure_step_rate`."""
    return models.pool.free >= models.pool.blocks_for(_positions(models))


def warm_up(models: Models, max_running: int, step_tokens: int) -> None:
    """Compile kernels and record passes of all sizes, so that no request waits for it; raises as `measure_step_rate`."""
    drafter, width = models.drafter, models.info.gamma + 1
    with _borrowed(models, step_tokens) as blocks:
        for tokens in sizes(max_running * width):
            _read(models, blocks, tokens, extend=True)
        if drafter is not None:
            for requests in sizes(max_running):
                _draft(models, drafter, blocks, requests)
        prompt = min(step_tokens, models.info.max_length - 1)
        for lengths in ([prompt], [1, min(LONG_QUERY, prompt)]):  # two kinds of kernels, see `PagedPass.of`
            step = _some_pass(models, blocks, np.array(lengths), 0)
            models.model.read(step, torch.zeros(1, dtype=torch.int64, device=models.device), models.feature_layers)
    wait(models)


@contextmanager
def _borrowed(models: Models, tokens: int = 0) -> Iterator[list[int]]:
    """Blocks to write to, for so many tokens at least."""
    table = BlockTable()
    if not models.pool.grow(table, max(_positions(models), min(tokens, models.info.max_length))):
        raise ServeError("no memory is free to measure in; do it before requests come")
    try:
        yield table.blocks
    finally:
        models.forget(table.blocks[0])
        models.pool.release(table)


def _positions(models: Models) -> int:
    """Of the memory that measuring writes to."""
    return _context(models) + models.info.gamma + 1


def _measure(largest: int, run: Callable[[int], None]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Sizes 1, 2, 4, ... and the fastest of a few runs each: the others were disturbed."""
    sizes: list[int] = []
    seconds: list[float] = []
    size, until = 1, time.perf_counter() + _SECONDS
    while size == 1 or (size <= largest and (size <= _AT_LEAST or time.perf_counter() < until)):
        run(size)  # the first of a size may compile or reserve memory
        taken: list[float] = []
        while not taken or (len(taken) < _REPEATS and time.perf_counter() < until):
            began = time.perf_counter()
            run(size)
            taken.append(time.perf_counter() - began)
        sizes.append(size)
        seconds.append(max(min(taken), seconds[-1] if seconds else 0.0))  # more tokens never cost less: that is noise
        size *= 2
    return tuple(sizes), tuple(seconds)


@torch.inference_mode()
def _read(models: Models, blocks: list[int], tokens: int, extend: bool = False) -> None:
    width = models.info.gamma + 1
    requests = -(-tokens // width)
    lengths = np.full(requests, width)
    lengths[-1] = tokens - width * (requests - 1)
    context = 0 if isinstance(models.model, SlowModel) else _context(models)  # that one has no caches yet
    step = _some_pass(models, blocks, lengths, context)
    read = models.model.read(step, None, models.feature_layers)
    if extend and models.drafter is not None and read.features_TF is not None:
        models.drafter.extend(step, read.features_TF, step.tokens)
    wait(models)


@torch.inference_mode()
def _draft(models: Models, drafter: PagedDrafter, blocks: list[int], requests: int) -> None:
    wanted = drafter.drafting_pass(np.zeros(requests, np.int64))
    lengths = np.full(requests, wanted.tokens_RP.shape[1])
    step = _some_pass(models, blocks, lengths, _context(models) + wanted.first, wanted.block)
    drafter.draft(step, torch.zeros(requests, dtype=torch.int64, device=models.device), None)
    wait(models)


def _context(models: Models) -> int:
    """Tokens before a pass; behind the longest request there is room for a proposal."""
    return min(_CONTEXT, models.info.max_length)


def _some_pass(models: Models, blocks: list[int], lengths: np.ndarray, context: int, block: bool = False) -> Pass:
    """Requests that all use the same blocks: only the time matters."""
    tables = np.tile(np.array(blocks), (len(lengths), 1))
    starts = np.full(len(lengths), context)
    tokens = np.zeros(int(lengths.sum()), np.int64)
    return Pass(tokens, starts, lengths, tables, models.pool.block_size, models.device, models.dtype, block)


def wait(models: Models) -> None:
    """Until a GPU has done what it was given; nothing to wait for on a CPU."""
    if models.device.type == "cuda":
        torch.cuda.synchronize(models.device)

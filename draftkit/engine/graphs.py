"""Passes of a few fixed shapes, recorded once and played back: CUDA graphs, which start a whole pass with one call.

A pass is filled up to a rectangle of requests x queries x blocks, each a power of two at least (queries: as they come).
Everything that changes from pass to pass lies in one integer tensor that the recording reads. What is tested without a GPU is
that a recording which only ever sees its own tensors gives the pass's numbers; so each new recording is played once beside
the pass that it recorded, and where one fails or differs no recording is used any more.

Shapes: R requests, Q queries of each, B blocks of each, T tokens of the pass, V vocabulary, F features, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.passes import LONG_QUERY, Group, Pass

log = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the largest number, between a recording and its pass
Outputs = tuple[Tensor, ...]
Record = Callable[[Callable[[], Outputs]], Callable[[], Outputs]]  # takes the pass once, gives what plays it back


@dataclass(frozen=True)
class Rectangle:
    """A recorded shape."""

    requests: int
    queries: int
    blocks: int
    block_size: int

    @staticmethod
    def around(step: Pass) -> Rectangle | None:
        """The smallest shape that holds the pass; None for one with a long piece of a prompt, which is not recorded."""
        queries = int(step.lengths_R.max())
        if queries > LONG_QUERY:
            return None
        requests, blocks = (1 << (n - 1).bit_length() for n in (len(step.lengths_R), step.tables_RB.shape[1]))
        return Rectangle(requests, queries, blocks, step.block_size)

    def fill(self, step: Pass, spare_slot: int) -> tuple[np.ndarray, np.ndarray]:
        """All that the recording reads, in one row, and the cell of each token of the pass, [T].

        Padding repeats a token of its request (or of the first one), and writes to `spare_slot`.
        """
        cells_RQ = np.arange(self.queries)
        real_RQ = np.zeros((self.requests, self.queries), bool)
        real_RQ[: len(step.lengths_R)] = cells_RQ < step.lengths_R[:, None]
        flat_RQ = np.zeros((self.requests, self.queries), np.int64)
        flat_RQ[: len(step.lengths_R)] = step.firsts_R[:, None] + np.minimum(cells_RQ, step.lengths_R[:, None] - 1)
        tables_RB = np.zeros((self.requests, self.blocks), np.int64)
        tables_RB[: len(step.tables_RB), : step.tables_RB.shape[1]] = step.tables_RB
        slots = np.where(real_RQ, step.slots_T[flat_RQ], spare_slot)
        of_tokens = (step.tokens_T[flat_RQ], step.positions_T[flat_RQ], slots, step.seen_T[flat_RQ], step.origins_T[flat_RQ])
        return np.concatenate([part.ravel() for part in (*of_tokens, tables_RB)]), np.flatnonzero(real_RQ)


class FixedPass:
    """What `Stack.run` reads of a pass, as views of one int64 tensor in the order of `Rectangle.fill`."""

    def __init__(self, shape: Rectangle, inputs: Tensor, dtype: torch.dtype) -> None:
        cells = shape.requests * shape.queries
        self.block_size, self._cells = shape.block_size, cells
        self.tokens, self.positions, self.slots, seen, origins = inputs[: 5 * cells].view(5, cells)
        square = (shape.requests, shape.queries)
        blocks, positions = inputs[5 * cells :], shape.blocks * shape.block_size
        seen, origins = seen.view(square), origins.view(square)
        self.groups = (Group(slice(None), None, None, shape.requests, blocks, positions, seen, origins, dtype),)

    def __len__(self) -> int:
        return self._cells


class RecordedPasses:
    """Plays passes of one model back, recording each shape when it is first seen. `forward` is the model's pass.

    When a recording cannot be made or differs from its pass, `reason` says so and `run` gives None from then on.
    """

    def __init__(self, forward: Callable[[FixedPass], Outputs], spare_slot: int, record: Record) -> None:
        self._forward, self._spare_slot, self._record = forward, spare_slot, record
        self._recorded: dict[Rectangle, tuple[Tensor, Callable[[], Outputs]]] = {}
        self.reason: str | None = None

    def run(self, step: Pass) -> Outputs | None:
        """The outputs of the pass's tokens, each [T, ...], or None for a pass that no recording can hold."""
        shape = Rectangle.around(step)
        if shape is None or self.reason is not None:
            return None
        filled, cells_T = shape.fill(step, self._spare_slot)
        there = torch.from_numpy(filled)
        if shape not in self._recorded:
            try:
                self._recorded[shape] = self._checked(shape, there.to(step.device), step.dtype)
            except RuntimeError as error:  # what CUDA refuses is one
                self.reason = next(iter(str(error).splitlines()), type(error).__name__)
                log.warning("recorded passes: not used: %s", self.reason)
                return None
        inputs, play = self._recorded[shape]
        inputs.copy_(there, non_blocking=True)
        cells = torch.from_numpy(cells_T).to(step.device)
        return tuple(output[cells] for output in play())


    def _checked(self, shape: Rectangle, inputs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Callable[[], Outputs]]:
        """A recording and the tensor that it reads. Raises RuntimeError when it differs from the pass."""

        def run() -> Outputs:
            # a pass made anew: masks that it has computed once would be no part of the recording
            return self._forward(FixedPass(shape, inputs, dtype))

        play = self._record(run)
        for eager, played in zip(run(), play(), strict=True):
            difference = float((eager - played).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(eager.abs().max())):
                raise RuntimeError(f"a recording of {shape} differs from its pass by {difference:.2g}")
        return inputs, play


def cuda_recorder() -> Record:
    """Records CUDA graphs that share one memory pool: the outputs of one are valid until the next is played."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        stream = torch.cuda.Stream()  # capturing asks for a warm-up beside the current stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = run()

        def play() -> Outputs:
            graph.replay()
            return outputs

        return play

    return record

"""Passes of a few fixed shapes, recorded once and played back: CUDA graphs, which start a whole pass with one call.

A pass is filled up to a rectangle of requests x queries x blocks, each a power of two at least (queries: as they come).
Everything that changes from pass to pass lies in one integer tensor that the recording reads. Unproven on a GPU: what is
tested is that a recording which only ever sees its own tensors gives the pass's numbers.

Shapes: R requests, Q queries of each, B blocks of each, T tokens of the pass, V vocabulary, F features, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.passes import LONG_QUERY, Group, Pass

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
    """Plays passes of one model back, recording each shape when it is first seen. `forward` is the model's pass."""

    def __init__(self, forward: Callable[[FixedPass], Outputs], spare_slot: int, record: Record) -> None:
        self._forward, self._spare_slot, self._record = forward, spare_slot, record
        self._recorded: dict[Rectangle, tuple[Tensor, Callable[[], Outputs]]] = {}

    def run(self, step: Pass) -> Outputs | None:
        """The outputs of the pass's tokens, each [T, ...], or None for a pass that no recording can hold."""
        shape = Rectangle.around(step)
        if shape is None:
            return None
        filled, cells_T = shape.fill(step, self._spare_slot)
        there = torch.from_numpy(filled)
        if shape not in self._recorded:
            inputs = there.to(step.device)
            # a pass made anew inside: masks that it has computed once would be no part of the recording
            self._recorded[shape] = (inputs, self._record(lambda: self._forward(FixedPass(shape, inputs, step.dtype))))
        inputs, play = self._recorded[shape]
        inputs.copy_(there, non_blocking=True)
        cells = torch.from_numpy(cells_T).to(step.device)
        return tuple(output[cells] for output in play())


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

"""Passes recorded once and played back: CUDA graphs, which start a whole pass with one call.

A recording is made for a number of tokens, whoever they belong to, and another pass is filled up to the next
such number. Everything that changes from pass to pass lies in one integer tensor that the recording reads
(`PagedPass`). What is tested without a GPU is that a recording which only ever sees its own tensors gives the
pass's numbers; so each new recording is played once beside the pass that it recorded, and where one fails or
differs no recording is used any more.

Shapes: T tokens of the pass, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draftkit.engine.passes import SHORT_TILE, PagedPass, Pass, flatten

log = logging.getLogger(__name__)
LONGEST = 4096  # tokens of a recording: above, starting single operations costs nothing beside them
# of the largest number: order of summing
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
Outputs = tuple[Tensor, ...]
# tokens and features, to outputs of an equal number of rows per token
Forward = Callable[[PagedPass, Tensor | None], Outputs]
Play = Callable[[], None]
Record = Callable[[Play], Play]  # takes the pass once, gives what plays it back


def padded(count: int) -> int:
    """The next number that recordings are made for: 1, 2, 4, 8, 12, 16, 24, 32, 48 ..."""
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power > 8 and count <= power * 3 // 4 else power


def sizes(largest: int) -> list[int]:
    """All that are needed for passes up to this one, LONGEST at most, the largest first: smaller ones then
    need no memory."""
    return sorted({padded(n) for n in range(1, min(largest, LONGEST) + 1)}, reverse=True)


@dataclass(frozen=True)
class _Recording:
    inputs: Tensor
    features: Tensor | None
    play: Play
    outputs: Outputs


class RecordedPasses:
    """Plays passes of one kind back, recording each size when it is first seen. `forward` is the pass;
    `widest` the blocks of the longest request, `unit` the tokens of each request where they are all the same,
    `features` how many numbers come with each token.

    When a recording cannot be made or differs from its pass, `reason` says so and `run` gives None from then
    on.
    """

    def __init__(
        self, forward: Forward, spare_slot: int, widest: int, record: Record, unit: int = 1, features: int = 0
    ) -> None:
        self._forward, self._spare_slot, self._widest, self._record = forward, spare_slot, widest, record
        self._unit, self._features = unit, features
        self._recordings: dict[int, _Recording] = {}
        # all recordings write to these; outputs of one are valid until the next is played
        self._outputs: list[Tensor] = []
        self.reason: str | None = None

    def run(self, step: Pass, features_TF: Tensor | None = None) -> Outputs | None:
        """The outputs of the pass, or None for one that no recording can hold. They are overwritten by the
        next."""
        tokens = self._unit * padded(len(step) // self._unit)
        if self.reason is not None or tokens > LONGEST or step.tables_RB.size > self._widest * tokens:
            return None
        filled = torch.from_numpy(flatten(step, tokens, tokens, SHORT_TILE, self._spare_slot))
        if tokens not in self._recordings:
            try:
                self._recordings[tokens] = self._checked(tokens, filled, step, features_TF)
            except RuntimeError as error:  # what CUDA refuses is one
                self.reason = next(iter(str(error).splitlines()), type(error).__name__)
                log.warning("recorded passes: not used: %s", self.reason)
                return None
        recording = self._recordings[tokens]
        recording.inputs[: len(filled)].copy_(filled, non_blocking=True)
        if recording.features is not None and features_TF is not None:
            recording.features[: len(step)].copy_(features_TF)
        recording.play()
        return tuple(output[: len(output) * len(step) // tokens] for output in recording.outputs)

    def _checked(self, tokens: int, filled: Tensor, step: Pass, features_TF: Tensor | None) -> _Recording:
        """A recording. Raises RuntimeError when it differs from the pass."""
        inputs = torch.zeros(8 * tokens + 1 + self._widest * tokens, dtype=torch.int64, device=step.device)
        inputs[: len(filled)] = filled.to(step.device)
        features = None
        if features_TF is not None:
            features = features_TF.new_zeros(tokens, self._features)
            features[: len(step)] = features_TF

        def run() -> Outputs:
            return self._forward(PagedPass(inputs, tokens, tokens, SHORT_TILE, step.block_size), features)

        eager = run()
        outputs = self._room(eager)

        def write() -> None:
            for room, output in zip(outputs, run(), strict=True):
                room.copy_(output)

        play = self._record(write)
        play()
        for wanted, played in zip(eager, outputs, strict=True):
            if not wanted.is_floating_point():
                continue  # tokens of nearly equal logits; the logits or confidences beside them are compared
            difference = float((wanted - played).abs().max())
            if not difference <= _TOLERANCES[wanted.dtype] * max(1.0, float(wanted.abs().max())):
                raise RuntimeError(
                    f"a recording of {tokens} tokens differs from its pass by {difference:.2g}"
                )
        return _Recording(inputs, features, play, outputs)

    def _room(self, outputs: Outputs) -> Outputs:
        """Where recordings write such outputs: shared by all, made larger when one needs more."""
        for index, output in enumerate(outputs):
            if index == len(self._outputs):
                self._outputs.append(torch.empty_like(output))
            elif len(self._outputs[index]) < len(output):
                self._outputs[index] = torch.empty_like(output)
        return tuple(room[: len(output)] for room, output in zip(self._outputs, outputs, strict=True))


def cuda_recorder() -> Record:
    """Records CUDA graphs that share one memory pool: only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Play) -> Play:
        stream = torch.cuda.Stream()  # capturing asks for a warm-up beside the current stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return record

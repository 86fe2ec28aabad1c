"""Compiled passes beside eager ones: built in the background while requests are served, used from when they are ready."""

from __future__ import annotations

import atexit
import copy
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.fast_drafter import FastDrafter, NativeDrafter, RecordedDrafter
from draftkit.engine.fast_model import FastModel
from draftkit.engine.graphs import Outputs, Record, RecordedPasses, cuda_recorder
from draftkit.engine.native import Ends, NativeStack
from draftkit.engine.passes import PagedPass, Pass
from draftkit.engine.stack import Stack
from draftkit.ops.native_build import NoNative, stop_compilers

_BLOCK, _SLOTS = 4, 24  # block size and positions of the check's own memory
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest number, between two orders of summing and rounding


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _end_building() -> None:
    """A thread that is inside C++ when the interpreter goes would take the process down with an abort."""
    stop_compilers()
    for thread in list(_threads):
        thread.join()


class CompiledPasses:
    """Builds the C++ passes of a target and, where there is one, its drafter, in a thread of its own. On a GPU passes are
    recorded as CUDA graphs instead, each size when it first comes.

    `feature_layers` are the layers whose outputs a recording gives, `widest` the blocks that the longest request has.

    Each model switches by itself, between two passes, after the new pass gave the eager one's numbers on a small memory
    aside. Where that cannot be, `reason` says why, and the PyTorch operations go on.
    """

    def __init__(
        self,
        model: FastModel,
        drafter: FastDrafter | None = None,
        feature_layers: tuple[int, ...] = (),
        widest: int = 1,
    ) -> None:
        self.reason: str | None = None
        given = model, drafter, feature_layers, widest
        self._thread = threading.Thread(target=self._build, args=given, name="compile", daemon=True)
        _threads.add(self._thread)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of building, at most `timeout` seconds; whether the compiled passes are in use."""
        self._thread.join(timeout)
        return not self._thread.is_alive() and self.reason is None

    def done(self) -> bool | None:
        """Whether the compiled passes are in use; None while they are being built."""
        return None if self._thread.is_alive() else self.reason is None

    def _build(
        self, model: FastModel, drafter: FastDrafter | None, feature_layers: tuple[int, ...], widest: int
    ) -> None:
        try:
            if model.embedding.device.type == "cuda":
                if not (model.stack.paged and (drafter is None or drafter.stack.paged)):
                    raise NoNative("no kernels for these heads or this dtype, or Triton is missing")
                record_passes(model, drafter, feature_layers, widest, cuda_recorder())
                return
            with torch.inference_mode():
                model.native = _native_model(model)
                if drafter is not None:
                    drafter.native = _native_drafter(drafter)
        except NoNative as error:
            self.reason = str(error)
        except Exception as error:  # whatever a machine may come up with, serving goes on
            self.reason = f"{type(error).__name__}: {error}"


def record_passes(
    model: FastModel, drafter: FastDrafter | None, feature_layers: tuple[int, ...], widest: int, record: Record
) -> None:
    """From now on, record each size of pass when it first comes, and play it back after that. `widest`: blocks of the longest
    request."""

    own = weakref.proxy(model)  # which holds its recordings: not in a circle, so that memory is free when it goes

    def read(step: PagedPass, _: Tensor | None) -> Outputs:
        outputs: Outputs = own.forward(step, None, feature_layers)
        return outputs

    model.recorded = RecordedPasses(read, model.stack.slots, widest, record)
    if drafter is not None:
        drafter.recorded = RecordedDrafter(drafter, widest, record)


def _native_model(model: FastModel) -> NativeStack:
    trial = copy.copy(model)
    trial.stack = Stack(model.stack.shape, model.stack.layers, _SLOTS)
    lengths_R = np.minimum([3, 5], len(model.stack.layers[0].rotary))
    step = _trial_pass(model.ends, np.zeros(2, np.int64), lengths_R)
    eager = trial.read(step, None).logits_WV
    trial.native = NativeStack(trial.stack, model.ends)
    _compare("target", eager, trial.read(step, None).logits_WV)
    trial.native.attach(model.stack)
    return trial.native


def _native_drafter(drafter: FastDrafter) -> NativeDrafter:
    trial, size = copy.copy(drafter), drafter.config.block_size
    trial.stack = Stack(drafter.stack.shape, drafter.stack.layers, _SLOTS + 2 * _BLOCK * size)
    lengths_R = np.minimum([3, 5], len(drafter.stack.layers[0].rotary) - size)
    context = _trial_pass(drafter.ends, np.zeros(2, np.int64), lengths_R, size)
    block = _trial_pass(drafter.ends, lengths_R, np.full(2, size), size)
    features_TF = torch.randn(len(context), drafter.fc.shape[1], generator=torch.Generator().manual_seed(0))
    anchors_R = torch.zeros(2, dtype=torch.int64)

    trial.native = native = NativeDrafter(drafter, trial.stack)
    trial.extend(context, features_TF, anchors_R)
    tokens_RG, compiled = trial.compiled_logits(block, anchors_R, native)
    trial.native = None
    trial.extend(context, features_TF, anchors_R)
    _compare("drafter", trial.logits_along(block, anchors_R, tokens_RG), compiled)
    native.stack.attach(drafter.stack)
    return native


def _trial_pass(ends: Ends, starts_R: np.ndarray, lengths_R: np.ndarray, block: int = 0) -> Pass:
    """Two requests in blocks out of order; behind a context it is a drafter's block of `block` tokens."""
    tokens = np.arange(lengths_R.sum()) % len(ends.embedding)
    width = -(-(8 + block) // _BLOCK)
    tables = np.arange(2 * width)[::-1].reshape(width, 2).T
    behind = bool(starts_R.any())
    return Pass(tokens, starts_R, lengths_R, tables, _BLOCK, torch.device("cpu"), ends.embedding.dtype, block=behind)


def _compare(what: str, eager: Tensor, native: Tensor) -> None:
    difference = float((eager - native).abs().max())
    if not difference <= _TOLERANCE[eager.dtype] * max(1.0, float(eager.abs().max())):
        raise NoNative(f"the compiled {what} differs from the eager one by {difference:.2g}")

"""Which passes run, chosen before the first request: on a CPU those in C++, on a GPU recorded ones, else
PyTorch operations.

A compiled pass is used after it has given the numbers of PyTorch operations on a small memory aside.
"""

from __future__ import annotations

import copy
import logging
import weakref

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.graphs import Outputs, Record, RecordedPasses, cuda_recorder
from draftkit.engine.models import Models
from draftkit.engine.native import Ends, NativeStack
from draftkit.engine.paged_drafter import NativeDrafter, PagedBlockDrafter, RecordedDrafter
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.passes import PagedPass, Pass
from draftkit.engine.stack import Stack
from draftkit.ops.native_build import NoNative

log = logging.getLogger("draftkit.engine")
_BLOCK, _SLOTS = 4, 24  # block size and positions of the check's own memory
# of a row's spread, between two orders of summing and rounding;
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# times as much in single rows: some tokens lie where a real model's bfloat16 passes are far from float32's,
# too
_WORST = 5


def compile_models(models: Models) -> bool:
    """Compile the passes of both models, or record them on a GPU; whether they are used. Where not, the log
    says why."""
    if not isinstance(models.model, PagedModel):
        return False  # the Transformers module, see `EngineInfo.forward`
    drafter = models.drafter if isinstance(models.drafter, PagedBlockDrafter) else None
    widest = models.pool.blocks_for(models.info.max_length + models.info.gamma + 1)
    reason = compile_passes(models.model, drafter, models.feature_layers, widest)
    if reason is not None:
        log.warning("no compiled passes: PyTorch operations do the same slower (%s)", reason)
    else:
        models.drop_copies()
    return reason is None


def compile_passes(
    model: PagedModel,
    drafter: PagedBlockDrafter | None = None,
    feature_layers: tuple[int, ...] = (),
    widest: int = 1,
) -> str | None:
    """Compile, and use what was compiled; the reason where that cannot be (PyTorch operations then go on).

    `feature_layers` are the layers whose outputs a recording gives, `widest` the blocks that the longest
    request has.
    """
    try:
        if model.embedding.device.type == "cuda":
            if not (model.stack.paged and (drafter is None or drafter.stack.paged)):
                raise NoNative("no kernels for these heads or this dtype, or Triton is missing")
            record_passes(model, drafter, feature_layers, widest, cuda_recorder())
            return None
        with torch.inference_mode():
            native = _native_model(model)
            if drafter is not None:
                drafter.native = _native_drafter(
                    drafter, native if _same(drafter.head.weight_VH, model.head) else None
                )
            model.native = native
    except NoNative as error:
        return str(error)
    except Exception as error:  # whatever a machine may come up with, serving goes on
        return f"{type(error).__name__}: {error}"
    return None


def record_passes(
    model: PagedModel,
    drafter: PagedBlockDrafter | None,
    feature_layers: tuple[int, ...],
    widest: int,
    record: Record,
) -> None:
    """From now on, record each size of pass when it first comes, and play it back after that. `widest`:
    blocks of the longest request."""

    # which holds its recordings: not in a circle, so that memory is free when it goes
    own = weakref.proxy(model)

    def read(step: PagedPass, _: Tensor | None) -> Outputs:
        outputs: Outputs = own.forward(step, None, feature_layers)
        return outputs

    model.recorded = RecordedPasses(read, model.stack.slots, widest, record)
    if drafter is not None:
        drafter.recorded = RecordedDrafter(drafter, widest, record)


def _native_model(model: PagedModel) -> NativeStack:
    trial = copy.copy(model)
    trial.stack = Stack(model.stack.shape, model.stack.layers, _SLOTS)
    lengths_R = np.minimum([3, 5], len(model.stack.layers[0].rotary))
    step = _trial_pass(model.ends, np.zeros(2, np.int64), lengths_R)
    eager = trial.read(step, None).logits_WV
    trial.native = NativeStack(trial.stack, model.ends)
    _compare("target", eager, trial.read(step, None).logits_WV)
    trial.native.attach(model.stack)
    return trial.native


def _native_drafter(drafter: PagedBlockDrafter, lender: NativeStack | None) -> NativeDrafter:
    trial, size = copy.copy(drafter), drafter.config.block_size
    trial.stack = Stack(drafter.stack.shape, drafter.stack.layers, _SLOTS + 2 * _BLOCK * size)
    lengths_R = np.minimum([3, 5], len(drafter.stack.layers[0].rotary) - size)
    context = _trial_pass(drafter.ends, np.zeros(2, np.int64), lengths_R, size)
    block = _trial_pass(drafter.ends, lengths_R, np.full(2, size), size)
    features_TF = torch.randn(len(context), drafter.fc.shape[1], generator=torch.Generator().manual_seed(0))
    trial.native = native = NativeDrafter(drafter, trial.stack, lender)
    trial.extend(context, features_TF, None)
    _, compiled = trial.read_block(block)
    trial.native = None
    trial.extend(context, features_TF, None)
    _compare("drafter", trial.read_block(block)[1], compiled)
    native.stack.attach(drafter.stack)
    return native


def _trial_pass(ends: Ends, starts_R: np.ndarray, lengths_R: np.ndarray, block: int = 0) -> Pass:
    """Two requests in blocks out of order; after a context it is a drafter's block of `block` tokens."""
    tokens = np.arange(lengths_R.sum()) % len(ends.embedding)
    width = -(-(8 + block) // _BLOCK)
    tables = np.arange(2 * width)[::-1].reshape(width, 2).T
    follows = bool(starts_R.any())
    return Pass(
        tokens, starts_R, lengths_R, tables, _BLOCK, torch.device("cpu"), ends.embedding.dtype, block=follows
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """The same numbers at the same place."""
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def _compare(what: str, eager: Tensor, native: Tensor) -> None:
    """Raise NoNative unless the rows of logits [..., V] are the same but for rounding and one number added to
    a whole row, which changes no distribution (in bfloat16 that number is the larger part)."""
    eager_NV, native_NV = (t.float().flatten(0, -2) for t in (eager, native))
    eager_NV, native_NV = (t - t.mean(-1, keepdim=True) for t in (eager_NV, native_NV))
    error_N = (eager_NV - native_NV).norm(dim=-1) / eager_NV.norm(dim=-1).clamp_min(1e-30)
    tolerance, middle, worst = _TOLERANCE[eager.dtype], float(error_N.median()), float(error_N.max())
    if not (middle <= tolerance and worst <= _WORST * tolerance):
        told = f"differs from the eager one by {middle:.2g} of a row's spread, at worst {worst:.2g}"
        raise NoNative(f"the compiled {what} {told}")

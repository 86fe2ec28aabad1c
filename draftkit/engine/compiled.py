"""Which passes run, chosen before the first request: on a CPU those in C++, on a GPU recorded ones, else
PyTorch operations.

A compiled pass is used after it has given the numbers of PyTorch operations in float32 on a small memory
aside.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.graphs import Outputs, Record, RecordedPasses, cuda_recorder
from draftkit.engine.memory import return_freed_memory
from draftkit.engine.models import Models
from draftkit.engine.native import Ends, NativeStack
from draftkit.engine.paged_drafter import NativeDrafter, PagedBlockDrafter, RecordedDrafter
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.passes import PagedPass, Pass
from draftkit.engine.stack import Layer, Stack
from draftkit.ops.native_build import NoNative

log = logging.getLogger("draftkit.engine")
_BLOCK, _SLOTS = 4, 24  # block size and positions of the check's own memory
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of a row


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
        return_freed_memory()  # of loading, before every weight lies here twice
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
    lengths_R = np.minimum([3, 5], len(model.stack.layers[0].rotary))
    step = _trial_pass(model.ends, np.zeros(2, np.int64), lengths_R)
    eager = copy.copy(model)
    eager.stack = Stack(model.stack.shape, _Widened(model.stack.layers), _SLOTS)
    eager.embedding, eager.norm = model.embedding[: len(step)].float(), model.norm.float()
    eager.head = model.head.float()
    wanted_TV = eager.read(step, None).logits_WV
    del eager  # its wide head, before the weights lie here twice
    trial = copy.copy(model)
    trial.stack = Stack(model.stack.shape, model.stack.layers, _SLOTS)
    trial.native = NativeStack(trial.stack, model.ends)
    _compare("target", model.embedding.dtype, wanted_TV, trial.read(step, None).logits_WV)
    trial.native.attach(model.stack)
    return trial.native


def _native_drafter(drafter: PagedBlockDrafter, lender: NativeStack | None) -> NativeDrafter:
    size, slots = drafter.config.block_size, _SLOTS + 2 * _BLOCK * drafter.config.block_size
    lengths_R = np.minimum([3, 5], len(drafter.stack.layers[0].rotary) - size)
    context = _trial_pass(drafter.ends, np.zeros(2, np.int64), lengths_R, size)
    block = _trial_pass(drafter.ends, lengths_R, np.full(2, size), size)
    features_TF = torch.randn(len(context), drafter.fc.shape[1], generator=torch.Generator().manual_seed(0))
    eager = copy.copy(drafter)
    eager.stack = Stack(drafter.stack.shape, _Widened(drafter.stack.layers), slots)
    eager.embedding = drafter.embedding[: len(block)].float()
    eager.fc, eager.context_kv = drafter.fc.float(), drafter.context_kv.float()
    eager.hidden_norm, eager.norm = drafter.hidden_norm.float(), drafter.norm.float()
    eager.k_norm = drafter.k_norm.float() if drafter.k_norm is not None else None
    eager.head = replace(drafter.head, weight_VH=drafter.head.weight_VH.float())
    trial = copy.copy(drafter)
    trial.stack = Stack(drafter.stack.shape, drafter.stack.layers, slots)
    trial.native = native = NativeDrafter(drafter, trial.stack, lender)
    for one in (eager, trial):
        one.extend(context, features_TF, None)
    _compare("drafter", drafter.fc.dtype, *(one.read_block(block)[1] for one in (eager, trial)))
    native.stack.attach(drafter.stack)
    return native


class _Widened(Sequence[Layer]):
    """Layers in float32, made one at a time, since all together may not fit. What PyTorch gives in bfloat16
    is no measure: some tokens of real models lie far from float32's there."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._made: tuple[int, Layer | None] = (-1, None)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        if self._made[0] != index:
            layer = self._layers[index]
            parts = {f.name: getattr(layer, f.name) for f in fields(layer)}
            wide: dict[str, Any] = {
                k: v.float() for k, v in parts.items() if isinstance(v, Tensor) and v.is_floating_point()
            }
            self._made = index, replace(layer, **wide)
        return self._made[1]


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


def _compare(what: str, dtype: torch.dtype, eager: Tensor, native: Tensor) -> None:
    """Raise NoNative unless rows of logits [..., V] are the same but for the order of summing and, of a model
    in bfloat16, the rounding of keys and values."""
    eager_NV, native_NV = (t.float().flatten(0, -2) for t in (eager, native))
    error = float(((eager_NV - native_NV).norm(dim=-1) / eager_NV.norm(dim=-1).clamp_min(1e-30)).max())
    if not error <= _TOLERANCE[dtype]:
        raise NoNative(f"the compiled {what} differs from the eager one by {error:.2g} of a row")

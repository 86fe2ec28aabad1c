"""The C++ functions of a training step (`cpp/training.cpp`) for Python: for float32 on a CPU with a
compiler.

PyTorch operations do the same where these do not fit; at the sizes of a small drafter they spend most of
their time on starting, and on numbers that leave the processor's cache in between.

Shapes: those of `ops/attention.py` and `draft/losses.py`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from draftkit.ops.native_build import NoNative, load_library, structure

LANES = 8  # numbers per vector, as in the source
_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_Blocks = structure(
    ("documents gamma own heads kv_heads size threads", _int),
    ("scale", _float),
    ("first start stop q own_k own_v seen_k seen_v out log_sum by_out", _pointer),
    ("by_q by_own_k by_own_v by_seen_k by_seen_v", _pointer),
)
_Distillation = structure(
    ("rows states vocab whole_vocab threads", _int),
    ("draft target whole state token draft_sum target_sum mass ce tv kl inner by_ce by_tv by_kl", _pointer),
)


@cache
def training_library() -> ctypes.CDLL | None:
    """The compiled functions, built now where they are not yet (seconds); None where nothing can be
    compiled."""
    try:
        return load_library("training")
    except NoNative:
        return None


def native_fits(size: int, *tensors: Tensor) -> bool:
    """Whether the functions take these tensors, whose last dimension is `size`."""
    fits = size % LANES == 0 and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return fits and training_library() is not None


def flush_denormals(on: bool) -> bool:
    """Whether numbers too small for a normal float count as 0 from here on, in this thread and those that
    share its work (PyTorch's own switch is for the calling thread alone); gives what was so before.

    Nothing changes where nothing can be compiled, and on processors without SSE.
    """
    library = training_library()
    return library is not None and bool(library.flush_denormals(_int(torch.get_num_threads()), _int(on)))


@dataclass(frozen=True)
class Ranges:
    """Which keys each block sees, int64 [X] twice, and the first block of each document, int64 [documents +
    1]."""

    start: Tensor
    stop: Tensor
    first: Tensor
    gamma: int
    own: int


class NativeBlockAttention(torch.autograd.Function):
    """softmax(scale q k) v of every block over its keys; all tensors contiguous float32."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        seen_k: Tensor,
        seen_v: Tensor,
        ranges: Ranges,
        scale: float,
    ) -> Tensor:
        """q [Q, N, D], own keys and values [P, M, D], those of the context [C, M, D] to [Q, N, D]."""
        inputs = [t.contiguous() for t in (q, own_k, own_v, seen_k, seen_v)]
        out, log_sum = torch.empty_like(inputs[0]), q.new_empty(q.shape[:2])
        _call("attend_blocks", _blocks(inputs, ranges, scale, out=out, log_sum=log_sum))
        ctx.save_for_backward(*inputs, out, log_sum)
        ctx.ranges, ctx.scale = ranges, scale
        return out

    @staticmethod
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the five tensors."""
        *inputs, out, log_sum = ctx.saved_tensors
        by_out = by_out.contiguous()
        gradients = [torch.zeros_like(t) for t in inputs]
        names = ("by_q", "by_own_k", "by_own_v", "by_seen_k", "by_seen_v")
        places = dict(zip(names, gradients, strict=True))
        _call(
            "push_back_blocks",
            _blocks(inputs, ctx.ranges, ctx.scale, out=out, log_sum=log_sum, by_out=by_out, **places),
        )
        return *gradients, None, None


def _blocks(inputs: list[Tensor], ranges: Ranges, scale: float, **more: Tensor) -> ctypes.Structure:
    q, own_k = inputs[:2]
    sizes = (len(ranges.first) - 1, ranges.gamma, ranges.own, q.shape[1], own_k.shape[1], q.shape[2])
    names = ("q", "own_k", "own_v", "seen_k", "seen_v")
    tensors = dict(zip(names, inputs, strict=True)) | more
    tensors |= {"first": ranges.first, "start": ranges.start, "stop": ranges.stop}
    return _Blocks(
        *sizes, torch.get_num_threads(), scale, **{name: t.data_ptr() for name, t in tensors.items()}
    )


class RowDistances:
    """CE, TV = |q - p|_1 and KL of rows, and sum_v q sign(q - p) as `inner`, all float32 [n]; then the
    gradient by the logits.

    Draft logits [n, V] and target logits [u, V], contiguous float32 on the CPU; each row's place among the
    latter and the token that follows, int64 [n] both. Where the draft vocabulary is a part of the target's,
    `whole_uW` are the logits of all of it: TV counts what lies outside, KL is taken inside (draft/losses.py),
    and a token -1 lies outside (its CE is infinite).
    """

    def __init__(
        self,
        draft_nV: Tensor,
        target_uV: Tensor,
        state_n: Tensor,
        token_n: Tensor,
        whole_uW: Tensor | None = None,
    ) -> None:
        count, self.draft_nV = len(draft_nV), draft_nV
        self.ce, self.tv, self.kl, self.inner, draft_sum = draft_nV.new_empty(5, count).unbind()
        target_sum, mass = draft_nV.new_empty(2, len(target_uV)).unbind()
        kept = {
            "draft": draft_nV,
            "target": target_uV,
            "state": state_n.contiguous(),
            "token": token_n.contiguous(),
        }
        if whole_uW is not None:
            kept["whole"] = whole_uW
        kept |= {"draft_sum": draft_sum, "target_sum": target_sum, "mass": mass}
        self._kept = kept | {"ce": self.ce, "tv": self.tv, "kl": self.kl, "inner": self.inner}
        _call("measure_rows", self._structure())

    def overwrite_with_gradient(self, by_ce: Tensor, by_tv: Tensor, by_kl: Tensor) -> None:
        """The gradient of sum(by_ce CE + by_tv TV + by_kl KL) by the draft logits, in their place."""
        self._kept |= {"by_ce": by_ce.contiguous(), "by_tv": by_tv.contiguous(), "by_kl": by_kl.contiguous()}
        _call("push_back_rows", self._structure())

    def _structure(self) -> ctypes.Structure:
        places = {name: tensor.data_ptr() for name, tensor in self._kept.items()}
        rows, vocab = self.draft_nV.shape
        whole = self._kept["whole"].shape[1] if "whole" in self._kept else vocab
        states, threads = len(self._kept["target"]), torch.get_num_threads()
        return _Distillation(rows, states, vocab, whole, threads, **places)


def _call(name: str, structure: ctypes.Structure) -> None:
    getattr(training_library(), name)(ctypes.byref(structure))

"""The C++ forward pass (`cpp/step.cpp`) for Python: laying out weights and calling it.

Why not `torch.compile`: at 1 to 8 tokens a pass is bound by reading weights and by starting operations. One
function needs no padded shapes, compiles once in seconds for every target, and weights that are bfloat16
numbers are read as such.

All is computed in float32. Of models in bfloat16 weights, keys and values are kept in bfloat16.

Shapes: T tokens, W wanted rows, H hidden, V vocabulary, F = K * H features, L layers, M key/value heads, D
head size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.engine.passes import Pass
from draftkit.engine.stack import Layer, Stack
from draftkit.ops.native_build import NoNative, load_library, structure

PANEL, LANES = 16, 8  # rows per panel of a matrix, numbers per vector: as in the source
FLOATS, HALVES, TILES = range(3)  # how the source reads a matrix, see matrix.h
_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

_Matrix = structure(("panels", _pointer), ("rows cols kind", _int))
_Layer = structure(
    ("heads kv_heads head_dim window value_norm", _int),
    ("scale score_cap output_scale", _float),
    (
        "input_norm qkv_bias qk_norm out_bias post_attention_norm mlp_norm mlp_out_norm rotary memory",
        _pointer,
    ),
    ("qkv out gate_up down", _Matrix),
)
_Stack = structure(("layers hidden gelu half", _int), ("eps", _float), ("layer", _pointer))
_Ends = structure(
    ("vocab half", _int),
    ("embedding norm", _pointer),
    ("embedding_scale logit_scale logit_cap", _float),
    ("head", _Matrix),
)
_Step = structure(
    ("tokens requests block_size table_width wanted captures block threads", _int),
    ("numbers features hidden logits best", _pointer),
)
HeadStructure = structure(
    ("kind", _int),
    ("w1", _pointer),
    ("w2 joint", _Matrix),
    ("joint_bias confidence", _pointer),
    ("confidence_size", _int),
    ("confidence_bias", _float),
)
DraftStructure = structure(
    ("requests positions hidden columns row threads first end part", _int),
    (
        "states logits confidence largest memory anchors ids tokens settings uniforms softmaxes sums chances",
        _pointer,
    ),
)
_Context = structure(("fc kv", _Matrix), ("norm k_norm", _pointer))


@dataclass(frozen=True)
class Ends:
    """What lies before and after the layers: embedding [V, H] and its factor, final norm [H], head [V, H];
    logits are cap * tanh(scale * x / cap), without a cap scale * x."""

    embedding: Tensor
    embedding_scale: float
    norm: Tensor
    head: Tensor
    logit_scale: float = 1.0
    logit_cap: float | None = None


class NativeStack:
    """One stack and its ends as `cpp/step.cpp` wants them; float32 or bfloat16 on the CPU.

    Keys and values are those of `stack`, so that passes of both kinds may follow each other. `lender` has
    packed the same head already. Raises NoNative when a size or dtype does not fit, or nothing can be
    compiled.
    """

    def __init__(self, stack: Stack, ends: Ends, lender: NativeStack | None = None) -> None:
        if ends.embedding.device.type != "cpu":
            raise NoNative(f"the C++ pass runs on the CPU, not on {ends.embedding.device.type}")
        sizes = [stack.shape.hidden, *(layer.attention.head_dim for layer in stack.layers)]
        if any(size % LANES for size in sizes):
            raise NoNative(f"hidden and head sizes {sorted(set(sizes))} must be multiples of {LANES}")
        dtype = ends.embedding.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise NoNative(f"the C++ pass computes in float32 or bfloat16, not {dtype}")
        self.library = load_library("step")
        half = dtype == torch.bfloat16
        self._half_kind = TILES if self.library.can_multiply(TILES) else HALVES
        self._kept: list[Tensor] = []
        self.hidden, self.vocab, self.embedded = stack.shape.hidden, len(ends.head), len(ends.embedding)
        self._layers = (_Layer * len(stack.layers))(*(self._layer(layer) for layer in stack.layers))
        layers = ctypes.cast(self._layers, _pointer)
        self._stack = _Stack(
            len(stack.layers), stack.shape.hidden, stack.shape.gelu, half, stack.shape.eps, layers
        )
        self._ends: Any = _Ends(
            self.vocab,
            half,
            self._keep(ends.embedding),
            self.at(ends.norm),
            ends.embedding_scale,
            ends.logit_scale,
            ends.logit_cap or 0.0,
            self.matrix(ends.head) if lender is None else lender._ends.head,
        )
        self._lender = lender  # its panels stay alive with this object
        self.attach(stack)

    def attach(self, stack: Stack) -> None:
        """Read and write the memory of `stack` from now on (a stack of the same layers)."""
        self._memory = stack.memory
        for layer, memory in zip(self._layers, stack.memory, strict=True):
            layer.memory = memory.data_ptr()

    def run(
        self,
        step: Pass,
        wanted_W: np.ndarray,
        capture: tuple[int, ...] = (),
        best_W: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits [W, V] and normed hidden states [W, H] of the wanted rows, features [T, F] of the layers
        `capture`, float32.

        `best_W`, int64 [W], gets the first largest logit of each row.
        """
        count = len(wanted_W)
        width = -(-self.vocab // LANES) * LANES
        logits_WV = torch.empty(count, width)
        hidden_WH = torch.empty(count, self.hidden)
        features_TF = torch.empty(len(step), len(capture) * self.hidden) if capture else None
        native, _numbers = _native_step(
            step, np.ascontiguousarray(wanted_W, dtype=np.int64), _ascending(capture)
        )
        native.logits, native.hidden = logits_WV.data_ptr(), hidden_WH.data_ptr()
        native.features = features_TF.data_ptr() if features_TF is not None else None
        native.best = best_W.ctypes.data if best_W is not None else None
        self.library.run_step(ctypes.byref(self._stack), ctypes.byref(self._ends), ctypes.byref(native))
        return logits_WV if width == self.vocab else logits_WV[:, : self.vocab], hidden_WH, features_TF

    def write_context(self, context: NativeContext, step: Pass, features_TF: Tensor) -> None:
        """Keys and values of context features at the pass's slots, all layers."""
        features_TF = features_TF.float().contiguous()
        native, _numbers = _native_step(step)
        self.library.write_context(
            ctypes.byref(self._stack),
            ctypes.byref(context.structure),
            ctypes.byref(native),
            _pointer(features_TF.data_ptr()),
        )

    def matrix(self, weight: Tensor) -> ctypes.Structure:
        """A matrix [out, in] in panels; kept alive with this object."""
        kind = self._half_kind if _is_half(weight) else FLOATS
        panels = pack_panels(weight, kind).contiguous()
        rows = -(-len(weight) // LANES) * LANES
        return _Matrix(self._keep(panels), rows, weight.shape[1], kind)

    def _layer(self, layer: Layer) -> ctypes.Structure:
        shape = layer.attention
        gate_up, down = _interleave(layer)
        return _Layer(
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.window or 0,
            shape.value_norm,
            shape.scale,
            shape.score_cap or 0.0,
            layer.output_scale,
            *(self.at(w) for w in (layer.input_norm, layer.qkv_bias, layer.qk_norm, layer.out_bias)),
            *(self.at(w) for w in (layer.post_attention_norm, layer.mlp_norm, layer.mlp_out_norm)),
            self.at(torch.view_as_real(layer.rotary)),
            None,  # the memory: see `attach`
            *(self.matrix(w) for w in (layer.qkv, layer.out, gate_up, down)),
        )

    def at(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor's numbers in float32, kept alive with this object; None stays None."""
        return None if tensor is None else self._keep(tensor.float())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


class NativeContext:
    """A drafter's projections of context features: fc [H, F], its norm [H], kv [2 L M D, H], norms of keys
    [L, D] or None."""

    def __init__(
        self, stack: NativeStack, fc: Tensor, norm: Tensor, kv: Tensor, k_norm: Tensor | None
    ) -> None:
        self._kept = stack  # weights stay alive with it
        self.structure = _Context(stack.matrix(fc), stack.matrix(kv), stack.at(norm), stack.at(k_norm))


def pack_panels(weight: Tensor, kind: int) -> Tensor:
    """[out, in] with rows filled up with zeros, in the order that the source wants of this kind of matrix, as
    a view where it can be one: FLOATS [out / 16, in, 16]; in bfloat16 HALVES [out / 16, in, 8, 2], rows 0, 8,
    1, 9, ... of a panel as neighbours, and TILES [out / 16, in / 32, 16, 16, 2], columns filled up, too."""
    wide = -weight.shape[1] % (2 * PANEL) if kind == TILES else 0
    short = -len(weight) % PANEL
    padded = F.pad(weight, (0, wide, 0, short)) if short or wide else weight
    if kind == FLOATS:
        return padded.float().unflatten(0, (-1, PANEL)).transpose(1, 2)
    padded = padded.to(torch.bfloat16)
    if kind == HALVES:
        return padded.unflatten(0, (-1, 2, LANES)).permute(0, 3, 2, 1)
    return padded.unflatten(0, (-1, PANEL)).unflatten(2, (-1, PANEL, 2)).permute(0, 2, 3, 1, 4)


def _is_half(weight: Tensor) -> bool:
    """All numbers are bfloat16's."""
    return torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)


def _interleave(layer: Layer) -> tuple[Tensor, Tensor]:
    """gate/up with 8 rows of each in turn, and down, the intermediate size filled up to a multiple of 8."""
    gate, up = layer.gate_up.chunk(2)
    fill = -len(gate) % LANES
    gate, up = (F.pad(w, (0, 0, 0, fill)).unflatten(0, (-1, LANES)) for w in (gate, up))
    return torch.stack([gate, up], 1).flatten(0, 2), F.pad(layer.down, (0, fill))


_NONE = np.empty(0, dtype=np.int64)


@cache  # an engine asks for the same layers in every step
def _ascending(layers: tuple[int, ...]) -> np.ndarray:
    return np.array(sorted(layers), dtype=np.int64)


def _native_step(
    step: Pass, wanted_W: np.ndarray = _NONE, captured: np.ndarray = _NONE
) -> tuple[ctypes.Structure, np.ndarray]:
    """The pass as the source wants it, and its numbers, which it points to: all in one array, since asking
    for an address costs more than copying."""
    numbers = np.concatenate(
        (step.tokens_T, step.starts_R, step.lengths_R, step.tables_RB.ravel(), wanted_W, captured)
    )
    requests, width = step.tables_RB.shape
    sizes = (len(step.tokens_T), requests, step.block_size, width, len(wanted_W), len(captured))
    return _Step(*sizes, step.block, torch.get_num_threads(), numbers.ctypes.data), numbers

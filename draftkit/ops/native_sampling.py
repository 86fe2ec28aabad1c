"""Sampling from rows of logits in C++ (`cpp/sampling.cpp`): float32 on a CPU, where something can be
compiled.

A row's distribution is described by a few numbers, and made where it is looked at only: the probability of a
drafted token is one exponential, the residual of a refused proposal one pass over two rows.

Shapes: N rows, V vocabulary, C columns of a row (V, or W where a drafter has a reduced vocabulary), P pairs
of rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from draftkit.ops.native_build import NoNative, load_library, structure

SETTING = np.dtype([("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("top_k", "i8")])
SOFTMAX = np.dtype(
    [
        ("total", "f8"),
        ("best", "i8"),
        ("last", "i8"),
        ("top", "f4"),
        ("slope", "f4"),
        ("cut", "f4"),
        ("single", "i4"),
    ]
)
CHUNK = 256  # as in the source
_int, _pointer = ctypes.c_int64, ctypes.c_void_p
_Rows = structure(("count columns stride threads", _int), ("logits softmaxes sums ids", _pointer))
_Residuals = structure(("count vocab", _int), ("p q p_row q_row weight", _pointer))


@cache
def sampling_library() -> ctypes.CDLL | None:
    """The compiled functions, built now where they are not yet (seconds); None where nothing can be
    compiled."""
    try:
        return load_library("sampling")
    except NoNative:
        return None


class NativeRows:
    """Distributions of rows of logits, float32 [N, C] on the CPU with neighbours next to each other, which
    are looked at when they are needed. `ids_C`, int64, are the tokens of the columns where these are fewer
    than `vocab`.

    The softmaxes and sums of chunks may come from elsewhere (`softmaxes_N`, `sums_NC`), or from `describe`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        logits_NC: Tensor,
        softmaxes_N: np.ndarray,
        sums_NC: np.ndarray,
        ids_C: Tensor | None = None,
        vocab: int | None = None,
    ) -> None:
        self._library, self.vocab = library, vocab or logits_NC.shape[1]
        self._kept = logits_NC, softmaxes_N, sums_NC, ids_C
        self.structure = _Rows(
            *logits_NC.shape,
            logits_NC.stride(0),
            torch.get_num_threads(),
            logits_NC.data_ptr(),
            softmaxes_N.ctypes.data,
            sums_NC.ctypes.data,
            ids_C.data_ptr() if ids_C is not None else None,
        )

    def __len__(self) -> int:
        return int(self.structure.count)

    @staticmethod
    def interleave(parts: Sequence[NativeRows]) -> NativeRows:
        """Row n of every part, then row n + 1 of every part; all have the same columns, which are the
        vocabulary."""
        logits, softmaxes, sums, _ = zip(*(part._kept for part in parts), strict=True)
        joined = (torch.stack(logits, 1).flatten(0, 1), np.stack(softmaxes, 1).ravel())
        return NativeRows(parts[0]._library, *joined, np.stack(sums, 1).reshape(-1, sums[0].shape[1]))

    @staticmethod
    def certain(tokens_N: np.ndarray, like: NativeRows) -> NativeRows:
        """Each row has all its mass on one token."""
        softmaxes_N = np.zeros(len(tokens_N), SOFTMAX)
        softmaxes_N["total"], softmaxes_N["single"], softmaxes_N["best"] = 1, 1, tokens_N
        logits_NV = torch.zeros(1, like.vocab).expand(len(tokens_N), -1)  # nobody looks at them
        return NativeRows(
            like._library, logits_NV, softmaxes_N, np.empty((len(tokens_N), chunks_of(like.vocab)))
        )

    def describe(self, settings_N: np.ndarray) -> None:
        """Work out the softmaxes."""
        settings_N = np.ascontiguousarray(settings_N)
        self._library.describe_rows(ctypes.byref(self.structure), _at(settings_N))

    def dense(self) -> Tensor:
        """Probabilities, float32 [N, V]."""
        probs_NV = torch.empty(len(self), self.vocab)
        self._library.fill_rows(ctypes.byref(self.structure), _int(self.vocab), _pointer(probs_NV.data_ptr()))
        return probs_NV

    def draw(self, uniforms_N: np.ndarray) -> Tensor:
        """One token of each row, int64 [N]; a row's token depends on that row and its uniform in [0, 1)
        alone."""
        return torch.from_numpy(self.draw_with_chances(uniforms_N)[0])

    def draw_with_chances(self, uniforms_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int64 [N], and their probabilities, float64 [N]."""
        uniforms_N = np.ascontiguousarray(uniforms_N, np.float64)
        tokens_N, chances_N = np.empty(len(self), np.int64), np.empty(len(self))
        self._library.draw_rows(ctypes.byref(self.structure), _at(uniforms_N), _at(tokens_N), _at(chances_N))
        return tokens_N, chances_N

    def chances(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The probability of a column in each of some rows, float64 of their shape."""
        rows, columns = (np.ascontiguousarray(a, np.int64) for a in (rows, columns))
        found = np.empty(rows.shape)
        self._library.find_chances(
            ctypes.byref(self.structure), _int(rows.size), _at(rows), _at(columns), _at(found)
        )
        return found

    def residual_sums(
        self, rows: np.ndarray, drafts: NativeRows, draft_rows: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """sum over tokens of max(0, weight p - q), of so many rows p of these and q of `drafts`: float64 of
        their shape."""
        pairs, _arrays = self._pairs(rows, drafts, draft_rows, weights)
        found = np.empty(rows.shape)
        self._library.sum_residuals(ctypes.byref(pairs), _at(found))
        return found

    def draw_residuals(
        self,
        rows: np.ndarray,
        drafts: NativeRows,
        draft_rows: np.ndarray,
        weights: np.ndarray,
        uniforms: np.ndarray,
    ) -> np.ndarray:
        """A token of each residual max(0, weight p - q), int64 [P]; of p itself where `draft_rows` is -1, and
        where nothing is left, which only rounding brings about."""
        pairs, _arrays = self._pairs(rows, drafts, draft_rows, weights)
        uniforms, tokens = np.ascontiguousarray(uniforms, np.float64), np.empty(len(rows), np.int64)
        self._library.draw_residuals(ctypes.byref(pairs), _at(uniforms), _at(tokens))
        return tokens

    def _pairs(
        self, rows: np.ndarray, drafts: NativeRows, draft_rows: np.ndarray, weights: np.ndarray
    ) -> tuple[ctypes.Structure, tuple[np.ndarray, ...]]:
        arrays = (
            np.ascontiguousarray(rows, np.int64),
            np.ascontiguousarray(draft_rows, np.int64),
            np.ascontiguousarray(weights, np.float64),
        )
        ours, theirs = (ctypes.cast(ctypes.pointer(r.structure), _pointer) for r in (self, drafts))
        return _Residuals(arrays[0].size, self.vocab, ours, theirs, *map(_at, arrays)), arrays


def native_rows(logits_NV: Tensor, settings_N: np.ndarray) -> NativeRows | None:
    """Described rows; None for tensors that are not float32 on the CPU, or where nothing can be compiled."""
    if logits_NV.device.type != "cpu" or logits_NV.dtype != torch.float32:
        return None
    library = sampling_library()
    if library is None:
        return None
    count, columns = logits_NV.shape
    if count and logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    rows = NativeRows(library, logits_NV, np.empty(count, SOFTMAX), np.empty((count, chunks_of(columns))))
    rows.describe(settings_N)
    return rows


def chunks_of(columns: int) -> int:
    """How many sums belong to a row."""
    return -(-columns // CHUNK)


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return _pointer(array.ctypes.data)

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
from dataclasses import dataclass
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
_Proposals = structure(
    ("count places", _int),
    ("p q settings lengths first draft_first tokens chances uniforms accepted next", _pointer),
)


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
        self.library, self.vocab = library, vocab or logits_NC.shape[1]
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
        return NativeRows(parts[0].library, *joined, np.stack(sums, 1).reshape(-1, sums[0].shape[1]))

    def describe(self, settings_N: np.ndarray) -> None:
        """Work out the softmaxes."""
        settings_N = np.ascontiguousarray(settings_N)
        self.library.describe_rows(ctypes.byref(self.structure), _at(settings_N))

    def dense(self) -> Tensor:
        """Probabilities, float32 [N, V]."""
        probs_NV = torch.empty(len(self), self.vocab)
        self.library.fill_rows(ctypes.byref(self.structure), _int(self.vocab), _pointer(probs_NV.data_ptr()))
        return probs_NV

    def draw(self, uniforms_N: np.ndarray) -> Tensor:
        """One token of each row, int64 [N]; a row's token depends on that row and its uniform in [0, 1)
        alone."""
        return torch.from_numpy(self.draw_with_chances(uniforms_N)[0])

    def draw_with_chances(self, uniforms_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int64 [N], and their probabilities, float64 [N]."""
        uniforms_N = np.ascontiguousarray(uniforms_N, np.float64)
        tokens_N, chances_N = np.empty(len(self), np.int64), np.empty(len(self))
        self.library.draw_rows(ctypes.byref(self.structure), _at(uniforms_N), _at(tokens_N), _at(chances_N))
        return tokens_N, chances_N


@dataclass(frozen=True)
class NativeProposals:
    """Proposals of R requests, G drafted tokens each, int64 [R, G]: of `lengths_R`, int64 [R], of them are
    verified, and `logits_NV` holds lengths + 1 rows of the target for each request, all with its setting,
    `SETTING` [R]. Row `draft_first_R[r]` + k of `drafts` is what the k-th token was drawn from, with
    `chances_RG`, float64; None where tokens were taken for certain."""

    logits_NV: Tensor
    settings_R: np.ndarray
    lengths_R: np.ndarray
    tokens_RG: np.ndarray
    chances_RG: np.ndarray
    draft_first_R: np.ndarray
    drafts: NativeRows | None

    def verify(self, uniforms_R2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token-wise rejection sampling as `ops.verify.verify` does it, row by row: how many tokens are
        accepted, and the token after them, int64 [R] each. The first uniform of a request picks the length,
        the second the token."""
        rows, requests = _undescribed(self.logits_NV), len(self.lengths_R)
        firsts_R = (self.lengths_R + 1).cumsum() - self.lengths_R - 1
        inputs = [
            np.ascontiguousarray(self.settings_R),
            *(
                np.ascontiguousarray(a, np.int64)
                for a in (self.lengths_R, firsts_R, self.draft_first_R, self.tokens_RG)
            ),
            *(np.ascontiguousarray(a, np.float64) for a in (self.chances_RG, uniforms_R2)),
        ]
        accepted_R, next_R = np.empty(requests, np.int64), np.empty(requests, np.int64)
        ours, theirs = (_address(r.structure) if r is not None else None for r in (rows, self.drafts))
        proposals = _Proposals(
            requests, self.tokens_RG.shape[1], ours, theirs, *map(_at, [*inputs, accepted_R, next_R])
        )
        rows.library.verify_tokens(ctypes.byref(proposals))
        return accepted_R, next_R


def describable(logits_NV: Tensor) -> bool:
    """Float32 on the CPU, where something can be compiled."""
    return (
        logits_NV.device.type == "cpu" and logits_NV.dtype == torch.float32 and sampling_library() is not None
    )


def native_rows(logits_NV: Tensor, settings_N: np.ndarray) -> NativeRows | None:
    """Described rows; None where they are not `describable`."""
    if not describable(logits_NV):
        return None
    rows = _undescribed(logits_NV)
    rows.describe(settings_N)
    return rows


def _undescribed(logits_NV: Tensor) -> NativeRows:
    library = sampling_library()
    if library is None:
        raise NoNative("nothing can be compiled here")
    count, columns = logits_NV.shape
    if count and logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    return NativeRows(library, logits_NV, np.empty(count, SOFTMAX), np.empty((count, chunks_of(columns))))


def chunks_of(columns: int) -> int:
    """How many sums belong to a row."""
    return -(-columns // CHUNK)


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return _pointer(array.ctypes.data)


def _address(structure: ctypes.Structure) -> ctypes.c_void_p:
    return ctypes.cast(ctypes.pointer(structure), _pointer)

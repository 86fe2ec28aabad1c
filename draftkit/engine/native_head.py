"""Drafting along a sequential head in C++ (`cpp/drafting.h`), for Python.

Shapes: R requests, G drafted positions, H hidden, C columns of the logits, V vocabulary, r Markov rank, D
rows that are drawn.
"""

from __future__ import annotations

import ctypes
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from draftkit.draft.heads import ConfidenceHead, MarkovHead
from draftkit.engine.drawing import Drafts, Drawing, Drawn
from draftkit.engine.native import DraftStructure, HeadStructure, NativeStack
from draftkit.ops.native_build import NoNative
from draftkit.ops.native_sampling import SOFTMAX, NativeRows, chunks_of, sampling_library

_KINDS = {"markov": 0, "gated": 1, "rnn": 2}
_ALL, _LOGITS, _TOKENS = range(3)  # parts of a walk, see types.h


class NativeHead:
    """A drafter's sequential head (or none) and confidence head (or none): from base logits to tokens, drawn
    or greedy.

    `ids_C`, int64, are the tokens of the logits' columns where the drafter has a reduced vocabulary.
    """

    def __init__(
        self,
        stack: NativeStack,
        markov: MarkovHead | None,
        confidence: ConfidenceHead | None,
        ids_C: Tensor | None,
    ) -> None:
        library = sampling_library()
        if library is None:
            raise NoNative("cpp/sampling.cpp cannot be compiled")
        # weights stay alive with the stack
        self._library, self._sampling, self._kept = stack.library, library, stack
        self.structure, self._confident, self._ids_C = (
            HeadStructure(),
            confidence is not None,
            ids_C,
        )
        self._rank, self._vocab = 0, stack.embedded
        if markov is not None:
            self._rank = markov.markov_w2.in_features
            self.structure.kind = _KINDS[markov.kind]
            self.structure.w1, self.structure.w2 = (
                stack.at(markov.markov_w1.weight),
                stack.matrix(markov.markov_w2.weight),
            )
            joint = {"gated": "gate_proj", "rnn": "joint_proj"}.get(markov.kind)
            if joint is not None:
                linear = cast(nn.Linear, getattr(markov, joint))
                self.structure.joint, self.structure.joint_bias = (
                    stack.matrix(linear.weight),
                    stack.at(linear.bias),
                )
        if confidence is not None:
            self.structure.confidence = stack.at(confidence.proj.weight)
            self.structure.confidence_size = confidence.proj.in_features
            self.structure.confidence_bias = float(confidence.proj.bias)

    def draft(
        self, hidden_RGH: Tensor, base_RGC: Tensor, anchors_R: Tensor, drawing: Drawing | None
    ) -> Drafts:
        """See `PagedBlockDrafter.draft`. The base logits are overwritten; their rows may be apart."""
        (requests, positions, hidden), columns = hidden_RGH.shape, base_RGC.shape[2]
        sizes = (
            requests,
            positions,
            hidden,
            columns,
            base_RGC.stride(1),
            torch.get_num_threads(),
            0,
            positions,
        )
        tokens_RG = torch.empty(requests, positions, dtype=torch.int64)
        said_RG, memory_Rr = torch.empty(requests, positions), torch.zeros(requests, self._rank)
        native = DraftStructure(*sizes, _ALL)
        native.states, native.logits, native.anchors = (
            hidden_RGH.data_ptr(),
            base_RGC.data_ptr(),
            anchors_R.data_ptr(),
        )
        native.tokens, native.memory = tokens_RG.data_ptr(), memory_Rr.data_ptr()
        native.ids = self._ids_C.data_ptr() if self._ids_C is not None else None
        setattr(native, "confidence" if self._confident else "largest", said_RG.data_ptr())
        drawn = None
        if drawing is not None and not drawing.greedy:
            softmaxes, sums = (
                np.empty(requests * positions, SOFTMAX),
                np.empty((requests * positions, chunks_of(columns))),
            )
            chances_RG = np.empty((requests, positions))
            native.settings, native.uniforms = drawing.settings_D.ctypes.data, drawing.uniforms_DG.ctypes.data
            native.softmaxes, native.sums, native.chances = (
                a.ctypes.data for a in (softmaxes, sums, chances_RG)
            )
            rows_NC = base_RGC.flatten(0, 1)
            drawn = Drawn(
                NativeRows(self._sampling, rows_NC, softmaxes, sums, self._ids_C, self._vocab), chances_RG
            )
        if drawing is not None and drawing.adjusts:
            self._draft_adjusted(native, base_RGC, tokens_RG, drawing)
        else:
            self._walk(native)
        return Drafts(tokens_RG, drawn, *((said_RG, None) if self._confident else (None, said_RG)))

    def _draft_adjusted(
        self, native: ctypes.Structure, base_RGC: Tensor, tokens_RG: Tensor, drawing: Drawing
    ) -> None:
        """Position by position, since the logits change in between."""
        for k in range(native.end):
            native.first, native.end = k, k + 1
            native.part = _LOGITS
            self._walk(native)
            if self._ids_C is None:
                drawing.adjust(base_RGC[:, k], k)
            else:
                whole_RV = base_RGC.new_full((len(base_RGC), self._vocab), float("-inf"))
                drawing.adjust(whole_RV.index_copy_(1, self._ids_C, base_RGC[:, k]), k)
                base_RGC[:, k] = whole_RV[:, self._ids_C]
            native.part = _TOKENS
            self._walk(native)
            drawing.note(tokens_RG[:, k])

    def _walk(self, native: ctypes.Structure) -> None:
        self._library.draft_tokens(ctypes.byref(self.structure), ctypes.byref(native))

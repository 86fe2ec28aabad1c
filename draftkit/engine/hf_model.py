"""Targets that the lean forward cannot run: the Transformers module, one request after the other, same seam.

Shapes: T tokens, W wanted rows, V vocabulary, F = K * H features of K layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftkit.engine.paged_model import ReadOut
from draftkit.engine.passes import Pass
from draftkit.target.interface import TargetCache
from draftkit.target.transformers import TransformersTarget


class HFModel:
    """Keeps one cache per request, found by the request's first block: prefixes must not be shared."""

    def __init__(self, target: TransformersTarget) -> None:
        self._target = target
        self._caches: dict[int, TargetCache] = {}

    @torch.inference_mode()
    def read(self, step: Pass, wanted: Tensor | None, feature_layers: tuple[int, ...] = ()) -> ReadOut:
        """Read the pass's tokens; see `PagedModel.read`."""
        hidden, features = [], []
        for row, (start, first, end) in enumerate(
            zip(step.starts_R, step.firsts_R, step.ends_R, strict=True)
        ):
            cache = self._cache(int(step.tables_RB[row, 0]), int(start))
            read = self._target.forward(step.tokens[None, first:end], cache, feature_layers)
            hidden.append(read.last_hidden_BTH[0])
            if read.features_BTF is not None:
                features.append(read.features_BTF[0])
        hidden_TH = torch.cat(hidden)
        logits = self._target.logits(hidden_TH if wanted is None else hidden_TH[wanted])
        return ReadOut(logits, torch.cat(features) if features else None)

    def forget(self, block: int) -> None:
        """Drop the cache of the request that has this first block."""
        self._caches.pop(block, None)

    def _cache(self, block: int, length: int) -> TargetCache:
        """The request's cache, cut to the tokens that were kept."""
        if length == 0:
            self._caches[block] = self._target.new_cache()
        cache = self._caches[block]
        if cache.length > length:
            cache.crop(length)
        return cache

"""What a target remembers of the tokens it has read, and how it forgets the last of them.

Shapes: B batch, T new tokens, S cached + new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy as copy_of
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from draftkit.errors import TargetError

# Layers whose memory is one entry per token. Anything else (linear attention, state spaces) folds tokens into
# a state.
PER_TOKEN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


class DynamicTargetCache:
    """A Transformers `DynamicCache` that is cropped from its end.

    Layers with a sliding window keep all tokens here; the mask hides the old ones. So they can be cropped as
    well.
    """

    def __init__(self) -> None:
        self.inner = DynamicCache()

    @property
    def length(self) -> int:
        """Tokens held."""
        return int(self.inner.get_seq_length())

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises TargetError when fewer than that are held."""
        surplus = self.length - length
        if surplus < 0 or length < 0:
            raise TargetError(
                f"crop to {length} tokens: the cache holds {self.length}; give a number up to that"
            )
        if surplus:
            self.inner.crop(-surplus)  # a negative number removes that many from the end

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch (int64 [B'])."""
        self.inner.batch_select_indices(rows)


class ReplayTargetCache:
    """For targets with layers that fold tokens into a state (linear attention, state spaces, compressors):
    their states before the last pass are kept, and what stays of the pass is read again with the next one.

    It can forget tokens that were read since then, as a round of drafting needs, if the last pass read more
    than one: plain generation copies nothing. Layers with one entry per token are cropped, and never copied.
    """

    def __init__(self, config: Any, read: Callable[..., Any]) -> None:
        self.inner = DynamicCache(config=config)
        self._read = read
        self._before: list[Any] | None = None  # copies of layers, None for those that are cropped
        self._tail: tuple[Tensor, Tensor | None] | None = None  # tokens and positions read since, or to read
        self._waiting = False  # the tail is to be read
        self._catching_up = False
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    def begin(
        self, tokens_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """To be called before each pass: keep the states, and give the tokens and positions to read, which
        are these after what waits."""
        several = tokens_BT.shape[1] > 1 and not self._catching_up
        if self._waiting and self._tail is not None:
            waiting_BT, places_BT = self._tail
            count, self._waiting = waiting_BT.shape[1], False
            self._length -= count
            if count <= tokens_BT.shape[1] and (places_BT is None) == (positions_BT is None):
                tokens_BT = torch.cat([waiting_BT, tokens_BT], 1)
                if places_BT is not None and positions_BT is not None:
                    positions_BT = torch.cat([places_BT, positions_BT], 1)
            else:  # or what waits would grow from round to round
                mask = mask_BS[:, : self._length + count] if mask_BS is not None else None
                self._catching_up = True  # nothing of this pass is taken back
                self._read(waiting_BT, self, mask, places_BT)
                self._catching_up = False
        self._before = self._tail = None
        if several:
            layers = self.inner.layers
            self._before = [None if type(one) is DynamicLayer else copy_of(one) for one in layers]
            self._tail = (tokens_BT, positions_BT)
        self._length += tokens_BT.shape[1]
        return tokens_BT, positions_BT

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises TargetError when that reaches back beyond the
        states that are kept."""
        if length == self._length:
            return
        earlier = self._length - (self._tail[0].shape[1] if self._tail else 0)
        if self._tail is None or not earlier <= length <= self._length:
            raise TargetError(
                f"crop to {length} tokens: this target can go back to {earlier}..{self._length} only"
            )
        for place, kept_layer in enumerate(self._before or ()):
            if kept_layer is None:
                layer: Any = self.inner.layers[place]
                layer.crop(earlier - self._length)  # a negative number: from the end
            else:
                self.inner.layers[place] = kept_layer
        tokens_BT, positions_BT = self._tail
        kept = length - earlier
        self._tail = (tokens_BT[:, :kept], positions_BT[:, :kept] if positions_BT is not None else None)
        self._before, self._waiting, self._length = None, kept > 0, length

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch (int64 [B'])."""
        layers: list[Any] = self.inner.layers
        for layer in layers:
            chosen = getattr(layer, "batch_select_indices", layer.reorder_cache)
            chosen(rows)
        self._before = None
        if self._tail is not None and self._waiting:
            tokens_BT, positions_BT = self._tail
            self._tail = (tokens_BT[rows], positions_BT[rows] if positions_BT is not None else None)
        else:
            self._tail = None


def needs_replay(model: Any) -> bool:
    """Whether the model folds tokens into a state that cannot be taken back."""
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return bool(getattr(model, "_is_stateful", False)) or not layers <= PER_TOKEN_LAYERS

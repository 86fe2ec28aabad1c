"""What a target remembers of the tokens it has read, and how it forgets the last of them.

Shapes: B batch, T new tokens, S cached + new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy as copy_of
from typing import Any

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
    """For targets with layers that fold tokens into a state (linear attention, state spaces): their states
    before the last pass are kept, and what stays of the pass is read again.

    It can forget tokens of its last pass, as a round of drafting needs, if that read more than one:
    plain generation copies nothing. Layers with one entry per token are cropped, and never copied.
    """

    def __init__(self, config: Any, read: Callable[..., Any]) -> None:
        self.inner = DynamicCache(config=config)
        self._read = read
        self._before: list[Any] | None = None  # copies of layers, None for those that are cropped
        self._length = 0
        self._last: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        self._reading_again = False

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    def remember(self, tokens_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor | None) -> None:
        """To be called before each pass: keep the states, and what is about to be read."""
        self._before = self._last = None
        if tokens_BT.shape[1] > 1 and not self._reading_again:
            layers = self.inner.layers
            self._before = [None if type(one) is DynamicLayer else copy_of(one) for one in layers]
            self._last = (tokens_BT, mask_BS, positions_BT)
        self._length += tokens_BT.shape[1]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises TargetError when that reaches back beyond the last
        pass."""
        if length == self._length:
            return
        earlier = self._length - (self._last[0].shape[1] if self._last else 0)
        if self._last is None or self._before is None or not earlier <= length <= self._length:
            raise TargetError(
                f"crop to {length} tokens: this target can go back to {earlier}..{self._length} only"
            )
        tokens_BT, mask_BS, positions_BT = self._last
        for place, kept_layer in enumerate(self._before):
            if kept_layer is None:
                layer: Any = self.inner.layers[place]
                layer.crop(earlier - self._length)  # a negative number: from the end
            else:
                self.inner.layers[place] = kept_layer
        kept = length - earlier
        self._length, self._before, self._last = earlier, None, None
        if kept:
            mask_BS = mask_BS[:, :length] if mask_BS is not None else None
            positions_BT = positions_BT[:, :kept] if positions_BT is not None else None
            self._reading_again = True
            try:
                self._read(tokens_BT[:, :kept], self, mask_BS, positions_BT)
            finally:
                self._reading_again = False

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch (int64 [B'])."""
        layers: list[Any] = self.inner.layers
        for layer in layers:
            chosen = getattr(layer, "batch_select_indices", layer.reorder_cache)
            chosen(rows)
        self._before = self._last = None


def needs_replay(model: Any) -> bool:
    """Whether the model folds tokens into a state that cannot be taken back."""
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return bool(getattr(model, "_is_stateful", False)) or not layers <= PER_TOKEN_LAYERS

"""What a target remembers of the tokens it has read, and how it forgets the last of them.

Shapes: B batch, T new tokens, S cached + new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache

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
    """For targets whose memory cannot be cropped: the state before the last pass is kept, and read on from
    again.

    Right for every model whose cache can be copied, and slower: a copy per pass, and a second reading of what
    is kept. It can forget tokens of its last pass only, which is what a round of drafting needs.
    """

    def __init__(self, config: Any, read: Callable[..., Any]) -> None:
        self.inner = DynamicCache(config=config)
        self._read = read
        self._before: DynamicCache | None = None
        self._length = 0
        self._last: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    def remember(self, tokens_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor | None) -> None:
        """To be called before each pass: keep the state and what is about to be read."""
        self._before = copy.deepcopy(self.inner)
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
        kept = length - earlier
        self.inner, self._length, self._before = self._before, earlier, None
        if kept:
            mask_BS = mask_BS[:, :length] if mask_BS is not None else None
            self._read(
                tokens_BT[:, :kept],
                self,
                mask_BS,
                positions_BT[:, :kept] if positions_BT is not None else None,
            )

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch (int64 [B'])."""
        self.inner.batch_select_indices(rows)
        self._before = self._last = None


def needs_replay(model: Any) -> bool:
    """Whether the model folds tokens into a state that cannot be taken back."""
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return bool(getattr(model, "_is_stateful", False)) or not layers <= PER_TOKEN_LAYERS

"""What a target remembers of the tokens it has read, and how it forgets the last of them.

Shapes: B batch, T new tokens, S cached + new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
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
    """For targets whose memory cannot be cropped: the state before the last pass is kept, and what stays of
    that pass is read again together with the next one.

    Right for every model whose cache can be copied, and slower: a copy per pass. It can forget tokens that
    were read since the state that is kept, which is what a round of drafting needs.
    """

    def __init__(self, config: Any, read: Callable[..., Any]) -> None:
        self.inner = DynamicCache(config=config)
        self._read = read
        self._before: DynamicCache | None = None  # the state before the tail, once `inner` has read that
        self._tail: tuple[Tensor, Tensor | None] | None = None  # tokens and positions
        self._waiting = False  # the tail is still to be read
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    def begin(
        self, tokens_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """To be called before each pass: keep the state, and give the tokens and positions to read, which
        are these after what waits."""
        if self._waiting and self._tail is not None:
            waiting_BT, places_BT = self._tail
            count = waiting_BT.shape[1]
            self._waiting, self._length = False, self._length - count
            together = (places_BT is None) == (positions_BT is None)
            if together and count <= tokens_BT.shape[1]:
                tokens_BT = torch.cat([waiting_BT, tokens_BT], 1)
                if places_BT is not None and positions_BT is not None:
                    positions_BT = torch.cat([places_BT, positions_BT], 1)
            else:  # or what waits would grow from round to round
                held = self._length + count
                self._read(waiting_BT, self, mask_BS[:, :held] if mask_BS is not None else None, places_BT)
        self._before = copy.deepcopy(self.inner)
        self._tail = (tokens_BT, positions_BT)
        self._length += tokens_BT.shape[1]
        return tokens_BT, positions_BT

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises TargetError when that reaches back beyond the
        state that is kept."""
        if length == self._length:
            return
        earlier = self._length - (self._tail[0].shape[1] if self._tail else 0)
        if self._tail is None or not earlier <= length <= self._length:
            raise TargetError(
                f"crop to {length} tokens: this target can go back to {earlier}..{self._length} only"
            )
        if self._before is not None:
            self.inner, self._before = self._before, None
        tokens_BT, positions_BT = self._tail
        kept = length - earlier
        self._tail = (tokens_BT[:, :kept], positions_BT[:, :kept] if positions_BT is not None else None)
        self._waiting, self._length = kept > 0, length

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch (int64 [B'])."""
        self.inner.batch_select_indices(rows)
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

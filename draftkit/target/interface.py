"""The interface of a target: what the rest of draftkit may ask of a frozen large model.

Shapes: B batch, T new tokens, S cached + new tokens, H hidden size, V vocabulary, F = K * H features of K
layers. Layer ids are OUTPUT indices: layer i means the residual stream after decoder layer i (0-based), which
Transformers calls hidden_states[i + 1]. The last layer is not allowed: engines disagree on what its output
is, but for DeepSeek-V4, whose own drafters read it. Of several residual streams a tap gives the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetInfo:
    """What a target is. `fingerprint` changes whenever weights, configuration or tokenizer change."""

    name: str
    revision: str | None
    fingerprint: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    stop_token_ids: tuple[int, ...]
    max_length: int  # tokens, prompt and answer together
    family: str  # model_type of the Transformers configuration


@dataclass(frozen=True)
class TargetOutput:
    """`last_hidden_BTH` is taken after the final norm: what `logits` expects. Features are None when none
    were asked."""

    last_hidden_BTH: Tensor
    features_BTF: Tensor | None


class TargetCache(Protocol):
    """The target's memory of the tokens it has read."""

    @property
    def length(self) -> int:
        """Tokens held."""
        ...

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


class HasWeights(Protocol):
    """What has a state dict: a module, or one that lies in files."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        ...


class TargetWeights(Protocol):
    """What a drafter is built from and checked against: a loaded target, or its files
    (`target/weights.py`)."""

    @property
    def info(self) -> TargetInfo:
        """What this target is."""
        ...

    @property
    def text_config(self) -> Any:
        """The Transformers configuration of the language model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        ...

    @property
    def layers(self) -> Iterable[HasWeights]:
        """The decoder layers, in order."""
        ...

    def final_norm(self) -> HasWeights:
        """The norm after the last layer."""
        ...

    def embedding_weight(self) -> Tensor:
        """[V, H]."""
        ...

    def head_weight(self) -> Tensor:
        """[V, H]."""
        ...


class Target(Protocol):
    """A frozen causal language model."""

    @property
    def info(self) -> TargetInfo:
        """What this target is."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes, and where what it is given must be."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., H]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm [..., H] to logits [..., V], a soft cap included."""
        ...

    def new_cache(self) -> TargetCache:
        """An empty cache."""
        ...

    def features(self, tokens_BT: Tensor, feature_layers: tuple[int, ...]) -> Tensor:
        """Features [B, T, F] of whole texts, without running what comes after the highest of these layers."""
        ...

    def forward(
        self,
        tokens_BT: Tensor,
        cache: TargetCache | None,
        feature_layers: tuple[int, ...] = (),
        mask_BS: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> TargetOutput:
        """Read `tokens_BT` after what the cache holds and add them to it.

        `mask_BS` is 1 for real tokens and 0 for padding, over cached and new tokens; `positions_BT` are
        absolute. Features are concatenated in ascending order of layer id.
        """
        ...

"""The one layer of an EAGLE-3 drafter.

Shapes: T tokens, H hidden, Q query heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftkit.draft.backbone import DraftLayer, RMSNorm, Rotation
from draftkit.draft.eagle3_shape import EagleConfig


class EagleLayer(DraftLayer):
    """The one layer: attention over [embedding ; state], then the MLP, both with residuals on the state."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config, 2 * config.hidden_size)
        self.norm_before_residual = config.norm_before_residual
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_eps)

    def join(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and states [..., H] to the layer's input u [..., 2 H] and its residual [..., H]."""
        normed = self.hidden_norm(state)
        return torch.cat(
            [self.input_layernorm(embedded), normed], -1
        ), normed if self.norm_before_residual else state

    def queries(self, u: Tensor, rotation: Rotation) -> Tensor:
        """Inputs [..., T, 2 H] to [..., T, Q, D]."""
        return self.self_attn.queries(
            self.self_attn.q_proj(u).unflatten(-1, (-1, self.self_attn.head_dim)), rotation
        )


def rotation_of(rope: Tensor) -> Rotation:
    """cos and sin [..., T, 2, D], ready to broadcast over heads."""
    return rope[..., None, 0, :], rope[..., None, 1, :]

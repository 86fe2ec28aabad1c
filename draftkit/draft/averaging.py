"""What rows of a loss weigh, and what their sum is divided by.

Over tokens: each row its position's weight, and the sum of these weights. Over conversations, as DeepSpec
trains EAGLE-3: each row its position's weight over the tokens of its conversation, those of the prompt
included, and the number of conversations; so a long one counts no more than a short one, and the steps' sums
are added up, not averaged.

Shapes: N rows that count, T tokens of all rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftkit.draft.drafter import TrainBatch
from draftkit.draft.layout import TrainLayout
from draftkit.draft.loss_terms import position_weights
from draftkit.settings import LossSettings


@dataclass(frozen=True)
class RowWeights:
    """`weights_N` of the rows, `total` their denominator, `scale_N` the factor of a row's weight beside its
    position's, or None. As accurate as the features, float32 at least."""

    weights_N: Tensor
    total: Tensor
    scale_N: Tensor | None


def row_weights(batch: TrainBatch, layout: TrainLayout, settings: LossSettings) -> RowWeights:
    """The weights of the rows that count; no wait for the device."""
    gamma = layout.drafted_XG.shape[1]
    accuracy = torch.promote_types(batch.features_BTF.dtype, torch.float32)
    weights_G = position_weights(settings, gamma).to(layout.row_N.device, accuracy)
    weights_N = weights_G[layout.row_N % gamma]
    if settings.average == "tokens":
        return RowWeights(weights_N, weights_N.sum(), None)
    rows, length = batch.document_BT.shape
    first_B1 = torch.arange(rows, device=weights_G.device)[:, None] * (length + 1) + 1
    number_T = (batch.document_BT + first_B1).flatten()  # padding has one of its own in each row
    counts = weights_G.new_zeros(2, rows * (length + 1) + 1)
    counts.index_add_(
        1, number_T, torch.stack([torch.ones_like(number_T), batch.loss_mask_BT.flatten()]).to(accuracy)
    )
    scale_N = 1 / counts[0][number_T[layout.anchor_X[layout.row_N // gamma]]]
    return RowWeights(weights_N * scale_N, (counts[1] > 0).sum().to(accuracy), scale_N)

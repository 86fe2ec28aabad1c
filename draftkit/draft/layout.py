"""Where the blocks of a training batch lie: which anchors are worth a block, what each block sees, which rows
count.

Rows of a batch, padding and documents are forgotten here: what remains are places in the flattened [B * T]
tokens. Nothing is kept of anchors without a drafted token that counts, nor of tokens that no block looks at.

Shapes: B rows, T tokens, A anchors, X blocks kept, G drafted tokens per block, C context tokens, N rows that
count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftkit.draft.drafter import TrainBatch


@dataclass(frozen=True)
class TrainLayout:
    """All int64. Blocks are in the order of their anchors; ranges are places among the C context tokens."""

    block_X: Tensor  # number of the block in the flattened [B, A] grid
    anchor_X: Tensor  # place of the anchor
    document_X: Tensor  # number of its document in the batch
    context_C: Tensor  # places of the tokens that some block sees
    start_X: Tensor  # block x sees context tokens start <= c < stop: those before its anchor
    stop_X: Tensor
    drafted_XG: Tensor  # places of the drafted tokens; beyond a block's end any place
    row_N: Tensor  # rows that count, in the [X, G] grid, ascending

    @property
    def grid_N(self) -> Tensor:
        """The same rows in the flattened [B, A, G] grid."""
        gamma = self.drafted_XG.shape[1]
        return self.block_X[self.row_N // gamma] * gamma + self.row_N % gamma


def lay_out(batch: TrainBatch, gamma: int, window: int | None) -> TrainLayout:
    """Blocks of `gamma` drafted tokens after the batch's anchors, over the last `window` positions before
    them or all."""
    rows, length = batch.tokens_BT.shape
    device = batch.tokens_BT.device
    row_B1 = torch.arange(rows, device=device)[:, None]
    # padding keeps a number of its own in each row
    document_T = (batch.document_BT + row_B1 * (length + 1)).flatten()
    anchor_Y = (batch.anchors_BA + row_B1 * length).flatten()
    drafted_YG = anchor_Y[:, None] + 1 + torch.arange(gamma, device=device)
    inside = (batch.anchors_BA.flatten()[:, None] + 1 + torch.arange(gamma, device=device)) < length
    drafted_YG = drafted_YG.clamp_max(rows * length - 1)
    counted = inside & batch.anchor_mask_BA.flatten()[:, None] & batch.loss_mask_BT.flatten()[drafted_YG]
    counted &= document_T[drafted_YG] == document_T[anchor_Y][:, None]
    counted = counted.long().cumprod(-1).bool()  # a block ends where the answer or its document ends

    block_X = counted[:, 0].nonzero().squeeze(-1)
    block_X = block_X[anchor_Y[block_X].argsort(stable=True)]
    anchor_X = anchor_Y[block_X]
    seen_X = batch.positions_BT.flatten()[anchor_X]  # the anchor's position is the number of tokens before it
    seen_X = seen_X if window is None else seen_X.clamp_max(window)
    context_C, start_X = _compact(anchor_X - seen_X, anchor_X, rows * length)
    row_N = counted[block_X].flatten().nonzero().squeeze(-1)
    return TrainLayout(
        block_X,
        anchor_X,
        document_T[anchor_X],
        context_C,
        start_X,
        start_X + seen_X,
        drafted_YG[block_X],
        row_N,
    )


def _compact(start_X: Tensor, stop_X: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keep what at least one range [start, stop) covers: the places kept, and the starts counted among
    them."""
    borders = torch.zeros(length + 1, dtype=torch.long, device=start_X.device)
    borders.index_add_(0, start_X, torch.ones_like(start_X)).index_add_(0, stop_X, -torch.ones_like(stop_X))
    covered = borders.cumsum(0)[:length] > 0
    # kept places before each
    before = torch.cat([covered.new_zeros(1, dtype=torch.long), covered.long().cumsum(0)])
    return covered.nonzero().squeeze(-1), before[start_X]

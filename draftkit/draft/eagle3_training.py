"""How an EAGLE-3 drafter learns: its steps unrolled with the conversation's own tokens ("training-time
test").

Step k of an anchor sees the context rows up to the anchor's and its own steps 1..k.

Shapes: X blocks, G = gamma steps, C context rows, N rows that count, T tokens of all rows of a batch, H
hidden, F = K * H features, U = 2 * H, Q query heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draftkit.draft.averaging import row_weights
from draftkit.draft.backbone import Attention
from draftkit.draft.drafter import LossReport, TrainBatch
from draftkit.draft.eagle3_layer import EagleLayer, rotation_of
from draftkit.draft.layout import TrainLayout, lay_out
from draftkit.draft.losses import Rows, distillation_loss
from draftkit.ops.attention import block_attention, plan_blocks
from draftkit.ops.compiled import for_device
from draftkit.settings import LossSettings

if TYPE_CHECKING:
    from draftkit.draft.eagle3 import EagleDrafter


def eagle_loss(drafter: EagleDrafter, batch: TrainBatch, settings: LossSettings) -> LossReport:
    """The distillation terms over all drafted positions that count; nothing is reduced over processes."""
    # a document's first token has no feature before it
    has_row_BA = batch.positions_BT.gather(1, batch.anchors_BA) > 0
    layout = lay_out(replace(batch, anchor_mask_BA=batch.anchor_mask_BA & has_row_BA), drafter.gamma, None)
    row_N, drafted_N = layout.row_N, layout.drafted_XG.flatten()[layout.row_N]
    weights = row_weights(batch, layout, settings)
    hidden_NH = drafter.norm(unrolled_states(drafter, batch, layout).flatten(0, 1)[row_N])
    rows = Rows(
        hidden_NH=hidden_NH,
        head=drafter.head(drafter.lm_head.weight),
        markov=None,
        target_hidden_NH=batch.last_hidden_BTH.flatten(0, 1)[drafted_N - 1].to(hidden_NH.dtype),
        target_head=drafter.head(drafter.whole_head()),
        tokens_N=drafter.draft_tokens(batch.tokens_BT.flatten()[drafted_N]),
        grid_N=row_N,
        gamma=drafter.gamma,
        place_N=drafted_N,
        draft_ids_W=drafter.draft_ids_W,
        scale_N=weights.scale_N,
    )
    losses = distillation_loss(rows, settings)
    weights_N = weights.weights_N.to(losses.ce_N)
    sums = losses.sums(weights_N)
    return LossReport(losses.loss, weights.total, sums, losses.accept_N, layout.grid_N)


def unrolled_states(drafter: EagleDrafter, batch: TrainBatch, layout: TrainLayout) -> Tensor:
    """States of all unrolled steps of all blocks, before the final norm: [X, G, H].

    The context tokens before an anchor are its rows; the last of them, which pairs with the anchor, is
    step 0.
    """
    layer, tokens_T, positions_T = drafter.midlayer, batch.tokens_BT.flatten(), batch.positions_BT.flatten()
    table = drafter.rope_table(batch.tokens_BT.shape[1] + drafter.gamma).to(drafter.fc.weight.dtype)
    features_CF = batch.features_BTF.flatten(0, 1)[layout.context_C]
    features_CH = drafter.project(features_CF)
    device = features_CH.device
    join, queries = for_device(EagleLayer.join, device), for_device(EagleLayer.queries, device)
    keys_values = for_device(Attention.keys_values, device)
    finish = for_device(EagleLayer.finish, device)
    u_CU, _ = join(layer, drafter.embed(tokens_T[layout.context_C + 1]), features_CH)
    seen = keys_values(layer.self_attn, u_CU, rotation_of(table[positions_T[layout.context_C]]))

    state_XH, states = features_CH[layout.stop_X - 1], []
    own: list[tuple[Tensor, Tensor]] = []
    nothing = tuple(t[:0] for t in seen)
    for k in range(drafter.gamma):
        place_X = (layout.anchor_X + k).clamp_max(len(tokens_T) - 1)
        u_XU, residual_XH = join(layer, drafter.embed(tokens_T[place_X]), state_XH)
        rotation = rotation_of(table[positions_T[layout.anchor_X] - 1 + k])
        if k:
            own.append(keys_values(layer.self_attn, u_XU, rotation))
        keys, values = (
            (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*own, strict=True)) if own else nothing
        )
        plan = plan_blocks(
            layout.start_X,
            layout.stop_X,
            layout.document_X,
            1,
            len(features_CH),
            drafter.config.head_dim,
            own=k,
        )
        q_XND = queries(layer, u_XU, rotation)
        mixed = block_attention(q_XND, (keys, values), seen, plan, layer.self_attn.scale)
        state_XH = finish(layer, residual_XH, mixed.flatten(1))
        states.append(state_XH)
        state_XH = drafter.fed_back(state_XH)
    return torch.stack(states, 1)

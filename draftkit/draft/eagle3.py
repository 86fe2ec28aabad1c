"""EAGLE-3: a drafter of one layer that drafts token by token and feeds its own state back (arXiv
2503.01840).

Row i of its sequence pairs feature f_i = W_c [H_i^(l1); ...; H_i^(lm)] with the embedding of token x_{i+1}
at position i:
    u_i = [RMSNorm(E x_{i+1}) ; RMSNorm(f_i)],  s_i = layer(u_i, residual f_i),  q(x_{i+2}) = softmax(W
      RMSNorm(s_i)).
From the anchor's row on there are no features: the state s takes the place of the next row's f. Training
unrolls the same steps ("training-time test"), with the conversation's own tokens: step k of an anchor sees
the context rows up to the anchor's and its own steps 1..k. One layer: keys and values of the context need
no attention.

A reduced draft vocabulary is a choice of target ids; q is zero outside it.

Shapes: B batch, T new tokens, G = gamma drafted tokens, V vocabulary, W draft vocabulary, H hidden, F = K
* H features, Q query heads, M key/value heads, D head size, U = 2 * H; in training X blocks, C context
rows, N rows that count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftkit.draft.averaging import row_weights
from draftkit.draft.backbone import Attention, DraftLayer, RMSNorm, Rotation, embed, rope_table
from draftkit.draft.drafter import DraftContext, DrafterShape, LossReport, Proposal, TrainBatch
from draftkit.draft.layout import TrainLayout, lay_out
from draftkit.draft.losses import Head, Rows, distillation_loss, needs_target
from draftkit.draft.vocabulary import ReducedHead
from draftkit.errors import ConfigError
from draftkit.ops.attention import block_attention, plan_blocks
from draftkit.ops.compiled import for_device
from draftkit.ops.sampling import Sampling, largest_prob, processed_probs, sample
from draftkit.settings import LossSettings

CONTEXT_GROWTH = 256  # rows by which a context's memory grows


NORMS = ("norm_before_fc", "fc_norm", "norm_output")  # EAGLE-3.1's


@dataclass(frozen=True, kw_only=True)
class EagleConfig(DrafterShape):
    """The shape of an EAGLE-3 drafter; `block_size` is the horizon of training and the number of drafted
    tokens.

    `draft_vocab_size` null is the target's vocabulary. `norm_before_residual`: the residual is the normed
    state instead of the state. EAGLE-3.1's: `norm_before_fc` norms the features together, `fc_norm` those of
    each layer by themselves, and with `norm_output` the normed state is fed back.
    """

    num_layers: int = 1
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers != 1:
            raise ConfigError(f"drafter.num_layers: {self.num_layers}, but an EAGLE-3 drafter has 1 layer")

    @property
    def algorithm(self) -> str:
        """The field's name for this kind of drafter."""
        return "eagle3"

    @property
    def numbers_per_token(self) -> int:
        """Keys, values, and the projected feature beside them."""
        return super().numbers_per_token + self.hidden_size


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


class EagleContext:
    """Keys and values [B, M, capacity, D] and projected features [B, capacity, H] of the committed rows.

    Row i needs token i + 1, so the anchor's row (the last) is made again when drafting starts from it.
    """

    def __init__(self, config: EagleConfig, batch: int, like: Tensor) -> None:
        shape = (batch, config.num_kv_heads, 0, config.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.features_BTH = like.new_empty(batch, 0, config.hidden_size)
        self._length = 0

    @property
    def length(self) -> int:
        """Committed tokens held."""
        return self._length

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._length = min(self._length, length)

    def append(self, keys: Tensor, values: Tensor, features_BTH: Tensor) -> None:
        """Commit T more rows."""
        end = self._length + keys.shape[2]
        self.make_room(end)
        self.keys[:, :, self._length : end], self.values[:, :, self._length : end] = keys, values
        self.features_BTH[:, self._length : end] = features_BTH
        self._length = end

    def make_room(self, rows: int) -> None:
        """Grow so that `rows` rows fit; what lies after `length` is scratch."""
        missing = rows - self.keys.shape[2]
        if missing > 0:
            room = -(-missing // CONTEXT_GROWTH) * CONTEXT_GROWTH
            self.keys, self.values, self.features_BTH = (
                F.pad(t, (0, 0, 0, room)) for t in (self.keys, self.values, self.features_BTH)
            )


class EagleDrafter(ReducedHead):
    """One layer, a final norm, and frozen copies of the target's embedding and head (its chosen rows).

    `draft_ids_W` are the target ids of the draft vocabulary, None for the whole. `target_head_VH`, the
    target's head, is needed for training when it is not `lm_head`, and is no part of a checkpoint.
    """

    config: EagleConfig
    _rope: Tensor | None

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.fc = nn.Linear(len(config.feature_layers) * hidden, hidden, bias=False)
        width = self.fc.in_features
        self.input_norm = RMSNorm(width, config.rms_eps) if config.norm_before_fc else None
        each = len(config.feature_layers) if config.fc_norm else 0
        self.fc_norm = nn.ModuleList(RMSNorm(hidden, config.rms_eps) for _ in range(each))
        self.midlayer = EagleLayer(config)
        self.norm = RMSNorm(hidden, config.rms_eps)
        self.lm_head = nn.Linear(hidden, config.head_size, bias=False)
        ids = torch.arange(config.head_size) if config.draft_vocab_size else None
        self.draft_ids_W = ids
        self.register_buffer("_rope", None, persistent=False)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                nn.init.normal_(module.weight, std=0.02)

    # --- drafting

    def new_context(self, batch: int = 1) -> EagleContext:
        """An empty context for `batch` requests of equal length."""
        return EagleContext(self.config, batch, self.norm.weight)

    @torch.inference_mode()
    def extend(self, context: DraftContext, features_BTF: Tensor, next_tokens_BT: Tensor) -> None:
        """Write keys and values of T committed rows: feature i with token i + 1."""
        own = _own(context)
        features_BTH = self.project(features_BTF)
        u, _ = self.midlayer.join(self._embed(next_tokens_BT), features_BTH)
        keys, values = self.midlayer.self_attn.keys_values(u, self._rotation_at(own.length, u.shape[1]))
        own.append(keys.transpose(1, 2), values.transpose(1, 2), features_BTH)

    @torch.inference_mode()
    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        """G steps of the layer; the first one is the last committed row, with the anchor as its token.

        Raises ValueError when the context holds no token yet.
        """
        own = _own(context)
        if not own.length:
            raise ValueError("an EAGLE-3 drafter needs at least one committed token before it drafts")
        row = own.length - 1
        own.make_room(row + self.gamma)
        state_B1H, token_B = own.features_BTH[:, row : row + 1], anchor_B
        tokens, probs, largest = [], [], []
        for k in range(self.gamma):
            state_B1H = self._step(own, row + k, token_B, state_B1H)
            logits_BV = self.logits(state_B1H[:, 0])
            state_B1H = self.fed_back(state_B1H)
            q_BV = processed_probs(logits_BV, sampling)
            token_B = q_BV.argmax(-1) if sampling.temperature == 0 else sample(q_BV, uniforms_BG[:, k])
            tokens.append(token_B)
            probs.append(q_BV)
            largest.append(largest_prob(logits_BV))
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1), None, torch.stack(largest, 1))

    def _step(self, context: EagleContext, row: int, token_B: Tensor, state_B1H: Tensor) -> Tensor:
        """The next state; keys and values of `row` are written into the context's scratch rows."""
        layer = self.midlayer
        u, residual = layer.join(self._embed(token_B[:, None]), state_B1H)
        rotation = self._rotation_at(row, 1)
        keys, values = layer.self_attn.keys_values(u, rotation)
        context.keys[:, :, row], context.values[:, :, row] = keys[:, 0], values[:, 0]
        mixed = F.scaled_dot_product_attention(
            layer.queries(u, rotation).transpose(1, 2),
            context.keys[:, :, : row + 1],
            context.values[:, :, : row + 1],
            scale=layer.self_attn.scale,
            enable_gqa=self.config.num_heads != self.config.num_kv_heads,
        )
        return layer.finish(residual, mixed.transpose(1, 2).flatten(2))

    def project(self, features: Tensor) -> Tensor:
        """Features of the target's layers [..., F] to f [..., H]."""
        features = features.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm:
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        projected: Tensor = self.fc(features)
        return projected

    def fed_back(self, state: Tensor) -> Tensor:
        """What of a state [..., H] takes the place of the next row's f."""
        return self.norm(state) if self.config.norm_output else state

    def logits(self, state_BH: Tensor) -> Tensor:
        """States [B, H] to draft logits over the target's vocabulary, -inf outside the draft vocabulary: [B,
        V]."""
        return self.over_target(self._head(self.lm_head.weight).logits(self.norm(state_BH)))

    def _head(self, weight: Tensor) -> Head:
        return Head(weight, self.config.logit_scale, self.config.soft_cap)

    def _rotation_at(self, start: int, count: int) -> Rotation:
        """cos and sin of consecutive positions; the table is made once, in float32."""
        if self._rope is None:
            table = self._rope_table(self.config.max_length + self.gamma)
            self._rope = table.to(self.norm.weight.dtype)
        return _rotation(self._rope[start : start + count])

    def _rope_table(self, length: int) -> Tensor:
        return rope_table(self.config, length, self.norm.weight.device)

    def _embed(self, tokens: Tensor) -> Tensor:
        return embed(self.embed_tokens, tokens, self.config)

    # --- training

    def needs_target(self, settings: LossSettings) -> bool:
        """See `Drafter`."""
        return needs_target(settings)

    def loss(self, batch: TrainBatch, settings: LossSettings) -> LossReport:
        """The distillation terms over all drafted positions that count; nothing is reduced over processes."""
        # a document's first token has no feature before it
        has_row_BA = batch.positions_BT.gather(1, batch.anchors_BA) > 0
        layout = lay_out(replace(batch, anchor_mask_BA=batch.anchor_mask_BA & has_row_BA), self.gamma, None)
        row_N, drafted_N = layout.row_N, layout.drafted_XG.flatten()[layout.row_N]
        weights = row_weights(batch, layout, settings)
        hidden_NH = self.norm(self._train_states(batch, layout).flatten(0, 1)[row_N])
        rows = Rows(
            hidden_NH=hidden_NH,
            head=self._head(self.lm_head.weight),
            markov=None,
            target_hidden_NH=batch.last_hidden_BTH.flatten(0, 1)[drafted_N - 1].to(hidden_NH.dtype),
            target_head=self._head(self.whole_head()),
            tokens_N=self.draft_tokens(batch.tokens_BT.flatten()[drafted_N]),
            grid_N=row_N,
            gamma=self.gamma,
            place_N=drafted_N,
            draft_ids_W=self.draft_ids_W,
            scale_N=weights.scale_N,
        )
        losses = distillation_loss(rows, settings)
        weights_N = weights.weights_N.to(losses.ce_N)
        sums = losses.sums(weights_N)
        return LossReport(losses.loss, weights.total, sums, losses.accept_N, layout.grid_N)

    def _train_states(self, batch: TrainBatch, layout: TrainLayout) -> Tensor:
        """States of all unrolled steps of all blocks, before the final norm: [X, G, H].

        The context tokens before an anchor are its rows; the last of them, which pairs with the anchor, is
        step 0.
        """
        layer, tokens_T, positions_T = self.midlayer, batch.tokens_BT.flatten(), batch.positions_BT.flatten()
        table = self._rope_table(batch.tokens_BT.shape[1] + self.gamma).to(self.fc.weight.dtype)
        features_CF = batch.features_BTF.flatten(0, 1)[layout.context_C]
        features_CH = self.project(features_CF)
        device = features_CH.device
        join, queries = for_device(EagleLayer.join, device), for_device(EagleLayer.queries, device)
        keys_values = for_device(Attention.keys_values, device)
        finish = for_device(EagleLayer.finish, device)
        u_CU, _ = join(layer, self._embed(tokens_T[layout.context_C + 1]), features_CH)
        seen = keys_values(layer.self_attn, u_CU, _rotation(table[positions_T[layout.context_C]]))

        state_XH, states = features_CH[layout.stop_X - 1], []
        own: list[tuple[Tensor, Tensor]] = []
        nothing = tuple(t[:0] for t in seen)
        for k in range(self.gamma):
            place_X = (layout.anchor_X + k).clamp_max(len(tokens_T) - 1)
            u_XU, residual_XH = join(layer, self._embed(tokens_T[place_X]), state_XH)
            rotation = _rotation(table[positions_T[layout.anchor_X] - 1 + k])
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
                self.config.head_dim,
                own=k,
            )
            q_XND = queries(layer, u_XU, rotation)
            mixed = block_attention(q_XND, (keys, values), seen, plan, layer.self_attn.scale)
            state_XH = finish(layer, residual_XH, mixed.flatten(1))
            states.append(state_XH)
            state_XH = self.fed_back(state_XH)
        return torch.stack(states, 1)


def _own(context: DraftContext) -> EagleContext:
    if not isinstance(context, EagleContext):
        raise TypeError(f"an EAGLE-3 drafter needs its own context, not {type(context).__name__}")
    return context


def _rotation(rope: Tensor) -> Rotation:
    """cos and sin [..., T, 2, D], ready to broadcast over heads."""
    return rope[..., None, 0, :], rope[..., None, 1, :]

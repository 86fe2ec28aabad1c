"""EAGLE-3: a drafter of one layer that drafts token by token and feeds its own state back (arXiv
2503.01840).

Row i of its sequence pairs feature f_i = W_c [H_i^(l1); ...; H_i^(lm)] with the embedding of token x_{i+1}
at position i:
    u_i = [RMSNorm(E x_{i+1}) ; RMSNorm(f_i)],  s_i = layer(u_i, residual f_i),  q(x_{i+2}) = softmax(W
      RMSNorm(s_i)).
From the anchor's row on there are no features: the state s takes the place of the next row's f. One layer:
keys and values of the context need no attention. Training unrolls the same steps (`eagle3_training.py`).

A reduced draft vocabulary is a choice of target ids; q is zero outside it.

Shapes: B batch, T new tokens, G = gamma drafted tokens, V vocabulary, W draft vocabulary, H hidden, F = K
* H features, M key/value heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftkit.draft.backbone import RMSNorm, Rotation, embed, rope_table
from draftkit.draft.drafter import DraftContext, LossReport, Proposal, TrainBatch
from draftkit.draft.eagle3_layer import EagleLayer, rotation_of
from draftkit.draft.eagle3_shape import EagleConfig
from draftkit.draft.eagle3_training import eagle_loss
from draftkit.draft.loss_terms import needs_target
from draftkit.draft.losses import Head
from draftkit.draft.vocabulary import ReducedHead
from draftkit.ops.sampling import Sampling, largest_prob, processed_probs, sample
from draftkit.settings import LossSettings

CONTEXT_GROWTH = 256  # rows by which a context's memory grows


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
        u, _ = self.midlayer.join(self.embed(next_tokens_BT), features_BTH)
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
        u, residual = layer.join(self.embed(token_B[:, None]), state_B1H)
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
        return self.over_target(self.head(self.lm_head.weight).logits(self.norm(state_BH)))

    def head(self, weight: Tensor) -> Head:
        """Rows of the target's output head, with the family's factor and soft cap."""
        return Head(weight, self.config.logit_scale, self.config.soft_cap)

    def _rotation_at(self, start: int, count: int) -> Rotation:
        """cos and sin of consecutive positions; the table is made once, in float32."""
        if self._rope is None:
            table = self.rope_table(self.config.max_length + self.gamma)
            self._rope = table.to(self.norm.weight.dtype)
        return rotation_of(self._rope[start : start + count])

    def rope_table(self, length: int) -> Tensor:
        """cos and sin of the first positions, [length, 2, D]."""
        return rope_table(self.config, length, self.norm.weight.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., H]."""
        return embed(self.embed_tokens, tokens, self.config)

    # --- training

    def needs_target(self, settings: LossSettings) -> bool:
        """See `Drafter`."""
        return needs_target(settings)

    def loss(self, batch: TrainBatch, settings: LossSettings) -> LossReport:
        """The distillation terms over all drafted positions that count; nothing is reduced over processes."""
        return eagle_loss(self, batch, settings)


def _own(context: DraftContext) -> EagleContext:
    if not isinstance(context, EagleContext):
        raise TypeError(f"an EAGLE-3 drafter needs its own context, not {type(context).__name__}")
    return context

"""The block drafter: DSpark, and DFlash as DSpark without heads.

Shapes: B batch, T new tokens, P block positions, G = gamma drafted tokens, V vocabulary, H hidden, F = K * H
features, L layers, M key/value heads, D head size; in training X blocks, Q = X * P, C context tokens, N rows
that count.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from draftkit.draft.backbone import DraftLayer, RMSNorm, Rotation, embed, rope_table
from draftkit.draft.drafter import DraftContext, DrafterConfig, LossReport, Proposal, TrainBatch
from draftkit.draft.heads import ConfidenceHead, MarkovHead
from draftkit.draft.layout import TrainLayout, lay_out
from draftkit.draft.losses import Head, Rows, distillation_loss, position_weights
from draftkit.draft.vocabulary import ReducedHead
from draftkit.ops.attention import plan_blocks
from draftkit.ops.sampling import Sampling, largest_prob, processed_probs, sample
from draftkit.settings import LossSettings

CONTEXT_GROWTH = 256  # positions by which a context's memory grows


class BlockContext:
    """Keys and values of the committed positions, for all layers: [L, B, M, capacity, D] twice."""

    def __init__(self, config: DrafterConfig, batch: int, like: Tensor) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, 0, config.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self._length = 0

    @property
    def length(self) -> int:
        """Committed tokens held."""
        return self._length

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._length = min(self._length, length)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add [L, B, M, T, D] at the end."""
        end = self._length + keys.shape[3]
        if end > self.keys.shape[3]:
            room = -(-end // CONTEXT_GROWTH) * CONTEXT_GROWTH - self.keys.shape[3]
            self.keys, self.values = (F.pad(t, (0, 0, 0, room)) for t in (self.keys, self.values))
        self.keys[:, :, :, self._length : end] = keys
        self.values[:, :, :, self._length : end] = values
        self._length = end


class BlockDrafter(ReducedHead):
    """Backbone, optional sequential head, optional confidence head; embedding and head (or its chosen rows)
    are frozen copies."""

    config: DrafterConfig

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.lm_head = nn.Linear(hidden, config.head_size, bias=False)
        self.draft_ids_W = torch.arange(config.head_size) if config.draft_vocab_size else None
        self.fc = nn.Linear(len(config.feature_layers) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, config.rms_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(hidden, config.rms_eps)
        self.markov_head = MarkovHead(config) if config.head != "none" else None
        self.confidence_head = ConfidenceHead(config) if config.confidence else None
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad and module.out_features > 1:
                w2 = self.markov_head.markov_w2 if self.markov_head is not None else None
                if module is not w2:  # that one starts at zero
                    nn.init.normal_(module.weight, std=0.02)

    def head(self) -> Head:
        """The target's output head, or its rows of the draft vocabulary, with the family's factor and soft
        cap."""
        return Head(self.lm_head.weight, self.config.logit_scale, self.config.soft_cap)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., H]."""
        return embed(self.embed_tokens, tokens, self.config)

    # --- drafting

    def new_context(self, batch: int = 1) -> BlockContext:
        """An empty context for `batch` requests of equal length."""
        return BlockContext(self.config, batch, self.norm.weight)

    @torch.inference_mode()
    def extend(self, context: DraftContext, features_BTF: Tensor, next_tokens_BT: Tensor) -> None:
        """Write keys and values of T committed positions for every layer; the tokens themselves are not
        needed."""
        block = _own(context)
        hidden = self.hidden_norm(self.fc(features_BTF.to(self.fc.weight.dtype)))
        rotation = self._rotation_at(block.length, hidden.shape[1])
        read = [layer.self_attn.keys_values(hidden, rotation) for layer in self.draft_layers()]
        # [L, B, M, T, D]
        keys, values = (torch.stack(parts).transpose(2, 3) for parts in zip(*read, strict=True))
        block.append(keys, values)

    @torch.inference_mode()
    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        """One pass of the backbone over the block, then the head from left to right."""
        hidden_BGH = self._block_hidden(_own(context), anchor_B)
        base_BGV = self.head().logits(hidden_BGH)
        previous_B, state = anchor_B, None
        tokens, probs, largest, embedded = [], [], [], []
        for k in range(self.gamma):
            logits_BV = base_BGV[:, k]
            if self.markov_head is not None:
                markov_Br = self.markov_head.previous(previous_B)
                row_Br, state = self.markov_head.step(hidden_BGH[:, k], markov_Br, state)
                logits_BV = logits_BV + self.markov_head.markov_w2(row_Br)
                embedded.append(markov_Br)
            logits_BV = self.over_target(logits_BV)
            q_BV = processed_probs(logits_BV, sampling)
            previous_B = q_BV.argmax(-1) if sampling.temperature == 0 else sample(q_BV, uniforms_BG[:, k])
            tokens.append(previous_B)
            probs.append(q_BV)
            largest.append(largest_prob(logits_BV))
        confidence = None
        if self.confidence_head is not None:
            markov = torch.stack(embedded, 1) if embedded else None
            confidence = torch.sigmoid(self.confidence_head(hidden_BGH, markov).float())
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1), confidence, torch.stack(largest, 1))

    def _block_hidden(self, context: BlockContext, anchor_B: Tensor) -> Tensor:
        """Normed hidden states of the G drafting positions, [B, G, H]."""
        config = self.config
        tokens_BP = torch.full(
            (len(anchor_B), config.block_size), config.mask_token_id, device=anchor_B.device
        )
        tokens_BP[:, 0] = anchor_B
        x = self.embed(tokens_BP)
        rotation = self._rotation_at(context.length, config.block_size)
        seen = slice(max(0, context.length - config.window) if config.window else 0, context.length)
        for index, layer in enumerate(self.draft_layers()):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q = attention.queries(attention.q_proj(normed).unflatten(-1, (-1, config.head_dim)), rotation)
            k, v = attention.keys_values(normed, rotation)
            mixed = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                torch.cat([context.keys[index, :, :, seen], k.transpose(1, 2)], 2),
                torch.cat([context.values[index, :, :, seen], v.transpose(1, 2)], 2),
                scale=attention.scale,
                enable_gqa=config.num_heads != config.num_kv_heads,
            )
            x = layer.finish(x, mixed.transpose(1, 2).flatten(2))
        hidden: Tensor = self.norm(x[:, config.block_size - self.gamma :])
        return hidden

    def draft_layers(self) -> list[DraftLayer]:
        """Its decoder layers, in order."""
        return cast(list[DraftLayer], list(self.layers))

    def _rope(self, length: int, first: int = 0) -> Tensor:
        return rope_table(self.config, length, self.norm.weight.device, first)

    def _rotation_at(self, first: int, count: int) -> Rotation:
        """cos and sin at the positions from `first` on, [count, 1, D] each."""
        table = self._rope(first + count, first).to(self.norm.weight.dtype)
        return table[:, None, 0], table[:, None, 1]

    # --- training

    def loss(self, batch: TrainBatch, settings: LossSettings) -> LossReport:
        """All terms over all drafted positions that count; nothing is reduced over processes."""
        layout = lay_out(batch, self.gamma, self.config.window)
        row_N, before_XG = layout.row_N, layout.drafted_XG - 1
        hidden_NH = self._train_hidden(batch, layout).flatten(0, 1)[row_N]
        previous_N = batch.tokens_BT.flatten()[before_XG].flatten()[row_N]
        embedded_Nr, markov_Nr = self._train_markov(hidden_NH, previous_N, layout)
        rows = Rows(
            hidden_NH=hidden_NH,
            head=self.head(),
            markov=(markov_Nr, self.markov_head.markov_w2.weight)
            if self.markov_head and markov_Nr is not None
            else None,
            target_hidden_NH=batch.last_hidden_BTH.flatten(0, 1)[before_XG.flatten()[row_N]].to(
                hidden_NH.dtype
            ),
            place_N=before_XG.flatten()[row_N],
            target_head=replace(self.head(), weight_VH=self.whole_head()),
            tokens_N=self.draft_tokens(batch.tokens_BT.flatten()[layout.drafted_XG.flatten()[row_N]]),
            grid_N=row_N,
            gamma=self.gamma,
            draft_ids_W=self.draft_ids_W,
        )
        losses = distillation_loss(rows, settings)
        weights_N = position_weights(settings, self.gamma).to(losses.ce_N)[row_N % self.gamma]
        sums = {"ce": weights_N @ losses.ce_N, "tv": weights_N @ losses.tv_N, "kl": weights_N @ losses.kl_N}
        loss = losses.loss
        if self.confidence_head is not None:
            logits_N = self.confidence_head(hidden_NH, embedded_Nr).to(losses.ce_N)
            bce_N = F.binary_cross_entropy_with_logits(logits_N, losses.accept_N, reduction="none")
            sums["confidence"] = (weights_N @ bce_N).detach()
            loss = loss + settings.confidence * (weights_N @ bce_N)
        return LossReport(loss, weights_N.sum(), sums, losses.accept_N, layout.grid_N)

    def _train_hidden(self, batch: TrainBatch, layout: TrainLayout) -> Tensor:
        """Normed hidden states of all drafting positions, [X, G, H]."""
        size, config = self.config.block_size, self.config
        positions_T = batch.positions_BT.flatten()
        offsets = torch.arange(size, device=positions_T.device)
        tokens_XP = torch.full((len(layout.anchor_X), size), config.mask_token_id, device=positions_T.device)
        tokens_XP[:, 0] = batch.tokens_BT.flatten()[layout.anchor_X]
        x_QH = self.embed(tokens_XP).flatten(0, 1)
        features_CF = batch.features_BTF.flatten(0, 1)[layout.context_C]
        context_CH = self.hidden_norm(self.fc(features_CF.to(self.fc.weight.dtype)))
        table = self._rope(batch.tokens_BT.shape[1] + size).to(x_QH.dtype)
        block_rope = _rotation(table, (positions_T[layout.anchor_X][:, None] + offsets).flatten())
        context_rope = _rotation(table, positions_T[layout.context_C])
        plan = plan_blocks(
            layout.start_X, layout.stop_X, layout.document_X, size, len(layout.context_C), config.head_dim
        )
        for layer in self.draft_layers():
            inputs = (x_QH, context_CH, block_rope, context_rope, plan)
            again = self.recompute and torch.is_grad_enabled()
            x_QH = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
        hidden: Tensor = self.norm(x_QH.unflatten(0, (-1, size))[:, size - self.gamma :])
        return hidden

    def _train_markov(
        self, hidden_NH: Tensor, previous_N: Tensor, layout: TrainLayout
    ) -> tuple[Tensor | None, Tensor | None]:
        """W_1[x_{k-1}] and m_k of the rows that count, with the conversation's own tokens as x_{k-1}."""
        if self.markov_head is None:
            return None, None
        embedded_Nr = self.markov_head.previous(previous_N)
        if self.markov_head.kind != "rnn":
            return embedded_Nr, self.markov_head.step(hidden_NH, embedded_Nr, None)[0]
        cells = layout.drafted_XG.numel()
        grids = [
            t.new_zeros(cells, t.shape[1]).index_copy(0, layout.row_N, t) for t in (hidden_NH, embedded_Nr)
        ]
        unrolled = self.markov_head.unroll(*(g.unflatten(0, (-1, self.gamma)) for g in grids))
        return embedded_Nr, unrolled.flatten(0, 1)[layout.row_N].to(hidden_NH.dtype)


def _own(context: DraftContext) -> BlockContext:
    if not isinstance(context, BlockContext):
        raise TypeError(f"a block drafter needs its own context, not {type(context).__name__}")
    return context


def _rotation(table: Tensor, positions_T: Tensor) -> Rotation:
    """cos and sin at some positions, [T, 1, D] each."""
    rows = table[positions_T]
    return rows[:, None, 0], rows[:, None, 1]

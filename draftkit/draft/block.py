"""The block drafter: DSpark, and DFlash as DSpark without heads.

Shapes: B batch, T new tokens, P block positions, G = gamma drafted tokens, V vocabulary, H hidden, F = K * H
features, L layers, M key/value heads, D head size; in training X blocks, Q = X * P, C context tokens, N rows
that count.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from draftkit.draft.backbone import DraftLayer, RMSNorm, Rotation, rope_table
from draftkit.draft.block_heads import BlockHeads
from draftkit.draft.drafter import DraftContext, DrafterConfig, TrainBatch
from draftkit.draft.heads import ConfidenceHead, MarkovHead
from draftkit.draft.layout import TrainLayout
from draftkit.ops.attention import plan_blocks

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


class BlockDrafter(BlockHeads):
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

    def _block_hidden(self, context: DraftContext, anchor_B: Tensor) -> Tensor:
        """Normed hidden states of the G drafting positions, [B, G, H]."""
        return self._block_states(context, anchor_B)[:, self.config.block_size - self.gamma :]

    def _block_states(self, context: DraftContext, anchor_B: Tensor) -> Tensor:
        """Normed hidden states of all positions of the block, [B, P, H]."""
        config, context = self.config, _own(context)
        tokens_BP = torch.full(
            (len(anchor_B), config.block_size), config.mask_token_id, device=anchor_B.device
        )
        tokens_BP[:, 0] = anchor_B
        x = self.embed(tokens_BP)
        rotation = self._rotation_at(context.length, config.block_size)
        seen = slice(max(0, context.length - config.window) if config.window else 0, context.length)
        for index, layer in enumerate(self.draft_layers()):
            attention, (normed, kept) = layer.self_attn, layer.enter(x)
            q = attention.queries(attention.q_proj(normed).unflatten(-1, (-1, config.head_dim)), rotation)
            k, v = attention.keys_values(normed, rotation)
            mixed = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                torch.cat([context.keys[index, :, :, seen], k.transpose(1, 2)], 2),
                torch.cat([context.values[index, :, :, seen], v.transpose(1, 2)], 2),
                attn_mask=self._mask(index, seen.start, context.length),
                scale=attention.scale,
                enable_gqa=config.num_heads != config.num_kv_heads,
            )
            x = layer.leave(x, mixed.transpose(1, 2).flatten(2), kept)
        hidden: Tensor = self.norm(x)
        return hidden

    def _mask(self, layer: int, first: int, length: int) -> Tensor | None:
        """What the block's positions see of those from `first` on, [P, context and P]; None: all."""
        if self.config.layer_attention is None:
            return None
        window, causal = self.config.layer_attention[layer]
        end, device = length + self.config.block_size, self.norm.weight.device
        seen_1S = torch.arange(first, end, device=device)[None]
        from_P1 = torch.arange(length, end, device=device)[:, None]
        mask_PS = seen_1S <= from_P1 if causal else torch.ones_like(from_P1 - seen_1S, dtype=torch.bool)
        return mask_PS if window is None else mask_PS & ((from_P1 - seen_1S).abs() < window)

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


def _own(context: DraftContext) -> BlockContext:
    if not isinstance(context, BlockContext):
        raise TypeError(f"a block drafter needs its own context, not {type(context).__name__}")
    return context


def _rotation(table: Tensor, positions_T: Tensor) -> Rotation:
    """cos and sin at some positions, [T, 1, D] each."""
    rows = table[positions_T]
    return rows[:, None, 0], rows[:, None, 1]

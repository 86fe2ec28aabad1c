"""The block drafter: DSpark, and DFlash as DSpark without heads.

Shapes: B batch, T new tokens, S context tokens, A anchors, P block positions, G = gamma drafted tokens, V vocabulary,
H hidden, F = K * H features, N rows that count, L layers, M key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftkit.draft.backbone import DraftLayer, RMSNorm, Rope, rope_table, rotate
from draftkit.draft.drafter import DraftContext, Drafter, DrafterConfig, LossReport, LossSettings, Proposal, TrainBatch
from draftkit.draft.heads import ConfidenceHead, MarkovHead
from draftkit.draft.losses import distillation_loss
from draftkit.ops.sampling import Sampling, processed_probs, sample

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


@dataclass(frozen=True)
class _Fused:
    """Weights joined for drafting, where the number of small operations decides the speed."""

    context_kv: Tensor  # [L * 2 * M * D, H]
    k_norm: Tensor  # [L, 1, 1, 1, D]
    qkv: tuple[Tensor, ...]  # per layer [(N + 2 M) * D, H]
    gate_up: tuple[Tensor, ...]  # per layer [2 * I, H]
    rope: Tensor  # [positions, 2, D]


class BlockDrafter(Drafter):
    """Backbone, optional sequential head, optional confidence head; embedding and head are frozen copies."""

    config: DrafterConfig

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.fc = nn.Linear(len(config.feature_layers) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, config.rms_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(hidden, config.rms_eps)
        self.markov_head = MarkovHead(config) if config.head != "none" else None
        self.confidence_head = ConfidenceHead(config) if config.confidence else None
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        self._fused: _Fused | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad and module.out_features > 1:
                w2 = self.markov_head.markov_w2 if self.markov_head is not None else None
                if module is not w2:  # that one starts at zero
                    nn.init.normal_(module.weight, std=0.02)

    def train(self, mode: bool = True) -> BlockDrafter:
        """Switch mode; joined drafting weights are dropped, since the parameters may change."""
        self._fused = None
        super().train(mode)
        return self

    # --- drafting

    def new_context(self, batch: int = 1) -> BlockContext:
        """An empty context for `batch` requests of equal length."""
        return BlockContext(self.config, batch, self.norm.weight)

    @torch.inference_mode()
    def extend(self, context: DraftContext, features_BTF: Tensor, next_tokens_BT: Tensor) -> None:
        """Write keys and values of T committed positions for every layer; the tokens themselves are not needed."""
        block = _own(context)
        fused, size = self._joined(), self.config.head_dim
        hidden = self.hidden_norm(self.fc(features_BTF.to(self.fc.weight.dtype)))
        kv = F.linear(hidden, fused.context_kv).unflatten(-1, (self.config.num_layers, 2, -1, size))
        kv = kv.permute(3, 2, 0, 4, 1, 5)  # [2, L, B, M, T, D]
        rope = fused.rope[block.length : block.length + hidden.shape[1]]
        keys = F.rms_norm(kv[0], (size,), None, self.config.rms_eps) * fused.k_norm
        block.append(rotate(keys, rope[:, 0], rope[:, 1]), kv[1])

    @torch.inference_mode()
    def propose(self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor) -> Proposal:
        """One pass of the backbone over the block, then the head from left to right."""
        hidden_BGH = self._block_hidden(_own(context), anchor_B)
        base_BGV = self.lm_head(hidden_BGH)
        previous_B, state = anchor_B, None
        tokens, probs, embedded = [], [], []
        for k in range(self.gamma):
            logits_BV = base_BGV[:, k]
            if self.markov_head is not None:
                markov_Br = self.markov_head.previous(previous_B)
                row_Br, state = self.markov_head.step(hidden_BGH[:, k], markov_Br, state)
                logits_BV = logits_BV + self.markov_head.markov_w2(row_Br)
                embedded.append(markov_Br)
            q_BV = processed_probs(logits_BV, sampling)
            previous_B = q_BV.argmax(-1) if sampling.temperature == 0 else sample(q_BV, uniforms_BG[:, k])
            tokens.append(previous_B)
            probs.append(q_BV)
        confidence = None
        if self.confidence_head is not None:
            markov = torch.stack(embedded, 1) if embedded else None
            confidence = torch.sigmoid(self.confidence_head(hidden_BGH, markov).float())
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1), confidence)

    def _block_hidden(self, context: BlockContext, anchor_B: Tensor) -> Tensor:
        """Normed hidden states of the G drafting positions, [B, G, H]."""
        config, fused = self.config, self._joined()
        tokens_BP = torch.full((len(anchor_B), config.block_size), config.mask_token_id, device=anchor_B.device)
        tokens_BP[:, 0] = anchor_B
        x = self.embed_tokens(tokens_BP)
        rope = fused.rope[context.length : context.length + config.block_size]
        cos, sin = rope[:, None, 0], rope[:, None, 1]
        heads, kv_heads = config.num_heads, config.num_kv_heads
        for index, layer in enumerate(self._blocks()):
            attention = layer.self_attn
            joined = F.linear(layer.input_layernorm(x), fused.qkv[index]).unflatten(-1, (-1, config.head_dim))
            q, k, v = joined.split((heads, kv_heads, kv_heads), -2)
            q = rotate(attention.q_norm(q), cos, sin).transpose(1, 2)
            k = rotate(attention.k_norm(k), cos, sin).transpose(1, 2)
            keys = torch.cat([context.keys[index, :, :, : context.length], k], 2)
            values = torch.cat([context.values[index, :, :, : context.length], v.transpose(1, 2)], 2)
            mixed = F.scaled_dot_product_attention(q, keys, values, enable_gqa=heads != kv_heads)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            gate, up = F.linear(layer.post_attention_layernorm(x), fused.gate_up[index]).chunk(2, -1)
            x = x + layer.mlp.down_proj(F.silu(gate) * up)
        hidden: Tensor = self.norm(x[:, config.block_size - self.gamma :])
        return hidden

    def _joined(self) -> _Fused:
        if self._fused is None:
            blocks = self._blocks()
            layers = [block.self_attn for block in blocks]
            context_kv = torch.cat([w for a in layers for w in (a.k_proj.weight, a.v_proj.weight)])
            k_norm = torch.stack([a.k_norm.weight for a in layers])[:, None, None, None]
            qkv = tuple(torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]) for a in layers)
            gate_up = tuple(torch.cat([m.mlp.gate_proj.weight, m.mlp.up_proj.weight]) for m in blocks)
            rope = self._rope(self.config.max_length + self.config.block_size)
            self._fused = _Fused(context_kv, k_norm, qkv, gate_up, rope.to(context_kv.dtype))
        return self._fused

    def _blocks(self) -> list[DraftLayer]:
        return cast(list[DraftLayer], list(self.layers))

    def _rope(self, length: int) -> Tensor:
        return rope_table(length, self.config.head_dim, self.config.rope_theta, self.norm.weight.device)

    # --- training

    def loss(self, batch: TrainBatch, settings: LossSettings) -> LossReport:
        """CE, TV and confidence over all drafted positions that count; nothing is reduced over processes."""
        anchors, gamma = batch.anchors_BA, self.gamma
        offsets = torch.arange(gamma, device=anchors.device)
        places_BAG = anchors[..., None] + 1 + offsets  # places of the drafted tokens in their row
        length = batch.tokens_BT.shape[1]
        inside = places_BAG < length
        places = places_BAG.clamp_max(length - 1)
        document_BA = batch.document_BT.gather(1, anchors)
        counted = inside & batch.anchor_mask_BA[..., None] & _pick(batch.loss_mask_BT, places)
        counted &= _pick(batch.document_BT, places) == document_BA[..., None]
        counted = counted.long().cumprod(-1).bool()  # a block ends where the answer or its document ends
        rows_N = counted.flatten().nonzero().squeeze(-1)

        hidden_NH = self._train_hidden(batch).flatten(0, 2)[rows_N]
        previous = _pick(batch.tokens_BT, places - 1)
        embedded_Nr, markov_Nr = self._train_markov(hidden_NH, previous, rows_N)
        target_NH = _pick(batch.last_hidden_BTH, places - 1).flatten(0, 2)[rows_N].to(hidden_NH.dtype)
        weights_N = settings.position_weights(gamma).to(hidden_NH.device)[rows_N % gamma]
        w2 = self.markov_head.markov_w2.weight if self.markov_head is not None else None
        loss, ce_N, tv_N = distillation_loss(
            hidden_NH,
            markov_Nr,
            w2,
            self.lm_head.weight,
            target_NH,
            _pick(batch.tokens_BT, places).flatten()[rows_N],
            settings.ce * weights_N,
            settings.tv * weights_N,
        )
        accept_N = (1 - tv_N / 2).clamp(0, 1)
        sums = {"ce": (weights_N * ce_N).sum(), "tv": (weights_N * tv_N).sum()}
        if self.confidence_head is not None:
            logits_N = self.confidence_head(hidden_NH, embedded_Nr).float()
            bce_N = F.binary_cross_entropy_with_logits(logits_N, accept_N, reduction="none")
            sums["confidence"] = (weights_N * bce_N).sum()
            loss = loss + settings.confidence * sums["confidence"]
        return LossReport(
            loss, weights_N.sum(), {k: v.detach() for k, v in sums.items()}, accept_N.detach(), rows_N
        )

    def _train_hidden(self, batch: TrainBatch) -> Tensor:
        """Normed hidden states of all drafting positions of all anchors, [B, A, G, H]."""
        size, config = self.config.block_size, self.config
        starts_BA = batch.positions_BT.gather(1, batch.anchors_BA)
        positions_BAP = starts_BA[..., None] + torch.arange(size, device=starts_BA.device)
        tokens = torch.full_like(positions_BAP, config.mask_token_id)
        tokens[..., 0] = batch.tokens_BT.gather(1, batch.anchors_BA)
        x = self.embed_tokens(tokens).flatten(1, 2)
        context_BSH = self.hidden_norm(self.fc(batch.features_BTF.to(self.fc.weight.dtype)))
        length = batch.tokens_BT.shape[1]
        rope = Rope(self._rope(length + size).to(x.dtype), batch.positions_BT, positions_BAP.flatten(1))
        hidden_from_BAS = torch.arange(length, device=x.device) >= batch.anchors_BA[..., None]
        hidden_from_BAS |= batch.document_BT[:, None] != batch.document_BT.gather(1, batch.anchors_BA)[..., None]
        for layer in self._blocks():
            x = layer.train_forward(x, context_BSH, rope, hidden_from_BAS, size)
        hidden: Tensor = self.norm(x).unflatten(1, (-1, size))[:, :, size - self.gamma :]
        return hidden

    def _train_markov(self, hidden_NH: Tensor, previous: Tensor, rows_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """W_1[x_{k-1}] and m_k of the rows that count, with the conversation's own tokens as x_{k-1}."""
        if self.markov_head is None:
            return None, None
        embedded_Nr = self.markov_head.previous(previous.flatten()[rows_N])
        if self.markov_head.kind != "rnn":
            return embedded_Nr, self.markov_head.step(hidden_NH, embedded_Nr, None)[0]
        grid = previous.numel()
        whole_h = hidden_NH.new_zeros(grid, hidden_NH.shape[1]).index_copy(0, rows_N, hidden_NH)
        whole_e = embedded_Nr.new_zeros(grid, embedded_Nr.shape[1]).index_copy(0, rows_N, embedded_Nr)
        unrolled = self.markov_head.unroll(
            whole_h.unflatten(0, (-1, self.gamma)), whole_e.unflatten(0, (-1, self.gamma))
        )
        return embedded_Nr, unrolled.flatten(0, 1)[rows_N]


def _own(context: DraftContext) -> BlockContext:
    if not isinstance(context, BlockContext):
        raise TypeError(f"a block drafter needs its own context, not {type(context).__name__}")
    return context


def _pick(values_BT: Tensor, places_BAG: Tensor) -> Tensor:
    """values[b, places[b, a, g]]: [B, A, G] or [B, A, G, H]."""
    rows = torch.arange(len(values_BT), device=values_BT.device)[:, None, None]
    return values_BT[rows, places_BAG]

"""DeepSeek-V4's DSpark module: blocks of the target's own kind over the last positions that the target has
read.

Its stages are V4 blocks: several residual streams that hyper-connections mix, attention with one shared head
that is key and value at once, sinks, experts. What the target thought enters as keys alone: main_x = norm(W
[H^(l1); ...; H^(lm)]) of each position becomes one key per stage, with the stage's own projection. All
positions of a block see the same: the `window` positions before its anchor, and the whole block.
Hyper-connections, experts and norms are Transformers' modules; `draft/deepseek_v4_checkpoint.py` knows
DeepSeek's names.

Shapes: X blocks (in drafting the B requests), G = gamma positions of a block, C context tokens, W window, S
stages, N streams, H hidden, M query heads, D head size, K = W + G keys, F features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    apply_rotary_pos_emb,
)

from draftkit.draft.block_heads import BlockHeads
from draftkit.draft.deepseek_v4_shape import DeepseekV4Shape
from draftkit.draft.drafter import DraftContext, TrainBatch
from draftkit.draft.heads import ConfidenceHead, MarkovHead
from draftkit.draft.layout import TrainLayout
from draftkit.draft.split_experts import SplitExperts

Rope = tuple[Tensor, Tensor]  # cos and sin of each pair of channels, float32
INIT_STD = 0.02


@dataclass(frozen=True)
class Seen:
    """What the blocks of a batch see of the target: main_x of the context tokens [C, H] with their rotations,
    and for each block the places among them, int64 [X, W], and which of these are real, bool."""

    main_CH: Tensor
    rope: Rope
    places_XW: Tensor
    real_XW: Tensor


class Stage(DeepseekV4DecoderLayer):
    """One V4 block without a compressor, over blocks of positions and what they see."""

    def __init__(self, config: DeepseekV4Config, number: int) -> None:
        super().__init__(config, number)
        self.mlp.experts = SplitExperts(config)

    def forward(  # type: ignore[override]
        self, streams_XGNH: Tensor, rope: Rope, seen: Seen
    ) -> Tensor:
        """A training batch's blocks: [X, G, N, H] to [X, G, N, H]."""
        keys_CD = self.context_keys(seen.main_CH, seen.rope)
        return self.read(streams_XGNH, rope, keys_CD[seen.places_XW], seen.real_XW)

    def context_keys(self, main: Tensor, rope: Rope) -> Tensor:
        """What the block's queries see of context tokens: [..., T, H] to [..., T, D]."""
        attention = self.self_attn
        keys: Tensor = attention.kv_norm(attention.kv_proj(main))
        return _rotated(keys.unsqueeze(-2), rope).squeeze(-2)

    def read(self, streams_XGNH: Tensor, rope: Rope, keys_XWD: Tensor, real_XW: Tensor) -> Tensor:
        """Attention, then experts, each between hyper-connections."""
        post, comb, x_XGH = self.attn_hc(streams_XGNH)
        update_XGH = self._attend(self.input_layernorm(x_XGH), rope, keys_XWD, real_XW)
        streams_XGNH = _mixed(streams_XGNH, update_XGH, post, comb)
        post, comb, x_XGH = self.ffn_hc(streams_XGNH)
        return _mixed(streams_XGNH, self.mlp(self.post_attention_layernorm(x_XGH)), post, comb)

    def _attend(self, x_XGH: Tensor, rope: Rope, keys_XWD: Tensor, real_XW: Tensor) -> Tensor:
        attention = self.self_attn
        latent = attention.q_a_norm(attention.q_a_proj(x_XGH))
        q_XGMD = attention.q_b_norm(attention.q_b_proj(latent).unflatten(-1, (-1, attention.head_dim)))
        q_XGMD = _rotated(q_XGMD, rope)
        keys_XKD = torch.cat([keys_XWD, self.context_keys(x_XGH, rope)], 1)
        seen_XK = nn.functional.pad(real_XW, (0, x_XGH.shape[1]), value=True)
        scores = torch.einsum("xgmd,xkd->xmgk", q_XGMD, keys_XKD).float() * attention.scaling
        scores = scores.masked_fill(~seen_XK[:, None, None], float("-inf"))
        sinks = attention.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1].to(keys_XKD.dtype)
        mixed_XGMD = torch.einsum("xmgk,xkd->xgmd", weights, keys_XKD)
        mixed_XGMD = _rotated(mixed_XGMD, (rope[0], -rope[1]))  # keys are values, and were rotated
        grouped = mixed_XGMD.flatten(2).unflatten(-1, (attention.config.o_groups, -1))
        update: Tensor = attention.o_b_proj(attention.o_a_proj(grouped).flatten(2))
        return update


class WindowContext:
    """The keys of the last committed positions for all stages, [S, B, T, D], and how many positions there
    were."""

    def __init__(self, config: DeepseekV4Shape, batch: int, like: Tensor) -> None:
        self.room = (config.window or 0) + config.gamma + 1  # a round's rejected positions can be taken back
        self.keys = like.new_empty(config.num_layers, batch, 0, config.head_dim)
        self._length = 0

    @property
    def length(self) -> int:
        """Committed tokens held."""
        return self._length

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises ValueError when that reaches further back than
        what is kept."""
        surplus = self._length - length
        if surplus <= 0:
            return
        if surplus > self.keys.shape[2]:
            raise ValueError(
                f"crop to {length} tokens: of {self._length} the last {self.keys.shape[2]} are kept"
            )
        self.keys = self.keys[:, :, : self.keys.shape[2] - surplus]
        self._length = length

    def append(self, keys_SBTD: Tensor, count: int) -> None:
        """Add `count` positions, of which the last are given."""
        kept = self.keys if keys_SBTD.shape[2] == count else self.keys[:, :, :0]
        self.keys = torch.cat([kept, keys_SBTD], 2)[:, :, -self.room :]
        self._length += count


class DeepseekV4Drafter(BlockHeads):
    """The module under `mtp.*` of a V4 checkpoint; embedding and head are the target's."""

    config: DeepseekV4Shape

    def __init__(self, config: DeepseekV4Shape) -> None:
        super().__init__()
        self.config = config
        blocks, hidden = block_config(config), config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.main_proj = nn.Linear(len(config.feature_layers) * hidden, hidden, bias=False)
        self.main_norm = DeepseekV4RMSNorm(hidden, eps=config.rms_eps)
        self.stages = nn.ModuleList(Stage(blocks, i) for i in range(config.num_layers))
        self.hc_head = DeepseekV4HyperHead(blocks)
        self.norm = DeepseekV4RMSNorm(hidden, eps=config.rms_eps)
        self.markov_head = MarkovHead(config)
        self.confidence_head = ConfidenceHead(config, bias=False)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
        for part in (self.main_proj, self.stages, self.hc_head):
            for name, parameter in part.named_parameters():
                _initialise(name, parameter)

    def head_input(self, hidden: Tensor) -> Tensor:
        """The head reads normed states, the confidence head those before the norm."""
        normed: Tensor = self.norm(hidden)
        return normed

    # --- drafting

    def new_context(self, batch: int = 1) -> WindowContext:
        """An empty context for `batch` requests of equal length."""
        return WindowContext(self.config, batch, self.main_proj.weight)

    @torch.inference_mode()
    def extend(self, context: DraftContext, features_BTF: Tensor, next_tokens_BT: Tensor) -> None:
        """Add T committed positions; of those that no block will see nothing is computed."""
        own, count = _own(context), features_BTF.shape[1]
        kept_BTF = features_BTF[:, -own.room :]
        main_BTH = self._main(kept_BTF)
        first = own.length + count - kept_BTF.shape[1]
        rope = self._rope(torch.arange(first, own.length + count, device=main_BTH.device))
        own.append(torch.stack([stage.context_keys(main_BTH, rope) for stage in self._stages()]), count)

    def _block_hidden(self, context: DraftContext, anchor_B: Tensor) -> Tensor:
        own, config = _own(context), self.config
        keys_SBWD = own.keys[:, :, -(config.window or 0) :]
        real_BW = torch.ones(keys_SBWD.shape[1:3], dtype=torch.bool, device=anchor_B.device)
        tokens_BG = torch.full((len(anchor_B), config.gamma), config.mask_token_id, device=anchor_B.device)
        tokens_BG[:, 0] = anchor_B
        rope = self._rope(own.length + torch.arange(config.gamma, device=anchor_B.device))
        streams = self._streams(tokens_BG)
        for stage, keys_BWD in zip(self._stages(), keys_SBWD, strict=True):
            streams = stage.read(streams, rope, keys_BWD, real_BW)
        hidden: Tensor = self.hc_head(streams)
        return hidden

    # --- training

    def _train_hidden(self, batch: TrainBatch, layout: TrainLayout) -> Tensor:
        if not len(layout.anchor_X):  # stages take no empty batch; where experts lie apart all processes run
            none = layout.anchor_X.new_zeros(1)
            one = replace(layout, anchor_X=none, context_C=none, start_X=none, stop_X=none)
            return self._train_hidden(batch, one)[:0]
        config, positions_T = self.config, batch.positions_BT.flatten()
        offsets_G = torch.arange(config.gamma, device=positions_T.device)
        tokens_XG = torch.full(
            (len(layout.anchor_X), config.gamma), config.mask_token_id, device=positions_T.device
        )
        tokens_XG[:, 0] = batch.tokens_BT.flatten()[layout.anchor_X]
        main_CH = self._main(batch.features_BTF.flatten(0, 1)[layout.context_C])
        places_XW = layout.start_X[:, None] + torch.arange(config.window or 0, device=positions_T.device)
        real_XW = places_XW < layout.stop_X[:, None]
        places_XW = places_XW.clamp(max=max(0, len(main_CH) - 1))
        seen = Seen(main_CH, self._rope(positions_T[layout.context_C]), places_XW, real_XW)
        rope = self._rope(positions_T[layout.anchor_X][:, None] + offsets_G)
        streams = self._streams(tokens_XG)
        for stage in self._stages():
            streams = stage(streams, rope, seen)
        hidden: Tensor = self.hc_head(streams)
        return hidden

    # --- parts of both

    def _stages(self) -> list[Stage]:
        return cast(list[Stage], list(self.stages))

    def _main(self, features: Tensor) -> Tensor:
        """main_x: features [..., F] to [..., H]."""
        main: Tensor = self.main_norm(self.main_proj(features.to(self.main_proj.weight.dtype)))
        return main

    def _streams(self, tokens_XG: Tensor) -> Tensor:
        embedded: Tensor = self.embed_tokens(tokens_XG)
        return embedded.unsqueeze(2).expand(-1, -1, self.config.streams, -1).contiguous()

    def _rope(self, positions: Tensor) -> Rope:
        """cos and sin at positions [...], float32 [..., R / 2]."""
        size = self.config.rope_dim
        exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles = positions[..., None].float() * self.config.rope_theta**-exponents
        return angles.cos(), angles.sin()


def _rotated(x: Tensor, rope: Rope) -> Tensor:
    """The last channels of heads [..., T, M, D] turned by the positions' angles [..., T, R / 2], pair by
    pair."""
    rotated: Tensor = apply_rotary_pos_emb(x, *rope, unsqueeze_dim=-2)
    return rotated


def _mixed(streams: Tensor, update: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams after a sub-block: its output added to each, the old ones mixed over the first index of
    `comb`."""
    old = torch.matmul(comb.to(streams.dtype).transpose(-1, -2), streams)
    return post.to(streams.dtype).unsqueeze(-1) * update.unsqueeze(-2) + old


def block_config(config: DeepseekV4Shape) -> DeepseekV4Config:
    """What Transformers' modules are made from: layers without compressors and without tables of experts."""
    blocks = DeepseekV4Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        layer_types=["sliding_attention"] * config.num_layers,
        mlp_layer_types=["moe"] * config.num_layers,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        q_lora_rank=config.q_lora_rank,
        partial_rotary_factor=config.rope_dim / config.head_dim,
        o_groups=config.o_groups,
        o_lora_rank=config.o_lora_rank,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        routed_scaling_factor=config.routed_scaling,
        scoring_func=config.scoring,
        swiglu_limit=config.swiglu_limit,
        hc_mult=config.streams,
        hc_sinkhorn_iters=config.sinkhorn_iters,
        hc_eps=config.hc_eps,
        rms_norm_eps=config.rms_eps,
    )
    blocks._experts_implementation = "eager"
    return blocks


@torch.no_grad()
def _initialise(name: str, parameter: nn.Parameter) -> None:
    """As Transformers begins a V4 model: matrices small and random, sinks and offsets 0, norms and scales
    1."""
    kind = name.split(".")[-1]
    if parameter.ndim > 1:
        parameter.normal_(std=INIT_STD)
    elif kind in ("sinks", "base", "hc_base"):
        parameter.zero_()
    else:
        parameter.fill_(1)


def _own(context: DraftContext) -> WindowContext:
    if not isinstance(context, WindowContext):
        raise TypeError(f"a V4 drafter needs its own context, not {type(context).__name__}")
    return context

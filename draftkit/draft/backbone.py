"""The transformer of a block drafter: its layers attend to injected context features and to their own block.

Context features are projected once, H_ctx = RMSNorm(W_c [H^(l1); ...; H^(lm)]), and enter every layer as keys and values
only: K_i = [W_i^K H_ctx ; W_i^K H_d], V_i likewise. Within a block attention is bidirectional.

Shapes: B batch, S context tokens, A anchors, G block positions, H hidden, N query heads, M key/value heads, D head size.
Names of modules are those of the portable checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftkit.draft.drafter import DrafterConfig, DrafterShape


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(length: int, head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """cos and sin of all positions, float32 [length, 2, D]: frequencies are computed here, never stored or cast."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return torch.stack([angles.cos(), angles.sin()], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the halves convention of Qwen and Llama; cos and sin broadcast to x [..., D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Projections of one layer; how keys meet queries differs between training and drafting."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * size, hidden, bias=False)
        self.q_norm = RMSNorm(size, config.rms_eps)
        self.k_norm = RMSNorm(size, config.rms_eps)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, H] to [B, N, T, D], normalised and rotated."""
        q = self.q_proj(x).unflatten(-1, (-1, self.config.head_dim))
        return rotate(self.q_norm(q), cos, sin).transpose(1, 2)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, H] to keys (normalised, rotated) and values, both [B, M, T, D]."""
        k = self.k_proj(x).unflatten(-1, (-1, self.config.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.config.head_dim))
        return rotate(self.k_norm(k), cos, sin).transpose(1, 2), v.transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DraftLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = MLP(config)

    def train_forward(
        self, x_BQH: Tensor, context_BSH: Tensor, rope: Rope, hidden_from_BAS: Tensor, gamma: int
    ) -> Tensor:
        """All blocks of a batch at once: x is [B, A * G, H]; `hidden_from_BAS` is true where a block must not look."""
        normed = self.input_layernorm(x_BQH)
        q = self.self_attn.queries(normed, *rope.block)
        own = self.self_attn.keys_values(normed, *rope.block)
        seen = self.self_attn.keys_values(context_BSH, *rope.context)
        mixed = block_attention(q, own, seen, hidden_from_BAS, gamma)
        x_BQH = x_BQH + self.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x_BQH + self.mlp(self.post_attention_layernorm(x_BQH))
        return out


class Rope:
    """cos/sin rows for the context positions and for the block positions, each ready to broadcast over heads."""

    def __init__(self, table: Tensor, positions_BS: Tensor, positions_BQ: Tensor) -> None:
        context, block = table[positions_BS], table[positions_BQ]
        self.context = (context[..., 0, :][:, :, None], context[..., 1, :][:, :, None])
        self.block = (block[..., 0, :][:, :, None], block[..., 1, :][:, :, None])


def block_attention(
    q_BNQD: Tensor, own: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], hidden_from_BAS: Tensor, gamma: int
) -> Tensor:
    """Attention of every block to its part of the context and to itself: [B, N, A * G, D].

    One softmax over S + G keys per query; no score between two blocks is ever computed, so memory grows with A * G * S,
    not with (A * G)^2. Scores and softmax are float32.
    """
    batch, heads, queries, size = q_BNQD.shape
    groups = heads // own[0].shape[1]
    anchors = queries // gamma
    own_k, own_v = (t.unflatten(2, (anchors, gamma)).repeat_interleave(groups, 1) for t in own)
    seen_k, seen_v = (t.repeat_interleave(groups, 1) for t in seen)
    q = q_BNQD * size**-0.5
    to_context = (q @ seen_k.transpose(-1, -2)).float().view(batch, heads, anchors, gamma, -1)
    to_context = to_context.masked_fill(hidden_from_BAS[:, None, :, None], float("-inf"))
    to_block = (q.unflatten(2, (anchors, gamma)) @ own_k.transpose(-1, -2)).float()
    probs = torch.softmax(torch.cat([to_context, to_block], -1), -1).to(q.dtype)
    length = seen_k.shape[2]
    from_context = probs[..., :length].flatten(2, 3) @ seen_v
    from_block = (probs[..., length:] @ own_v).flatten(2, 3)
    return from_context + from_block

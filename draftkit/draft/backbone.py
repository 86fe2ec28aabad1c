"""The transformer of a block drafter: its layers attend to injected context features and to their own block.

Context features are projected once, H_ctx = RMSNorm(W_c [H^(l1); ...; H^(lm)]), and enter every layer as keys
and values only: K_i = [W_i^K H_ctx ; W_i^K H_d], V_i likewise. Within a block attention is bidirectional.
What differs between families of targets is a row of `draft/families.py`.

Shapes: C context tokens, Q block positions, H hidden, N query heads, M key/value heads, D head size, I
intermediate. Names of modules are those of the portable checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftkit.draft.drafter import DrafterShape
from draftkit.draft.families import STYLES
from draftkit.draft.rotary import rotary_frequencies
from draftkit.ops.attention import BlockPlan, block_attention
from draftkit.ops.compiled import for_device

Rotation = tuple[Tensor, Tensor]  # cos and sin, ready to broadcast over heads


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(
    config: DrafterShape, length: int, device: torch.device | None = None, first: int = 0
) -> Tensor:
    """cos and sin of the positions first..length - 1, float32 [length - first, 2, D]: frequencies are
    computed here, never stored or cast."""
    frequencies, factor = rotary_frequencies(config, device)
    angles = torch.arange(first, length, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return torch.stack([angles.cos(), angles.sin()], 1) * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the halves convention of Qwen and Llama; cos and sin broadcast to x [..., D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def embed(table: nn.Embedding, tokens: Tensor, config: DrafterShape) -> Tensor:
    """Token ids [...] to embeddings [..., H], scaled where the family does so (in the weights' dtype)."""
    embedded: Tensor = table(tokens)
    if STYLES[config.style].scaled_embedding:
        return embedded * torch.tensor(config.hidden_size**0.5, dtype=embedded.dtype, device=embedded.device)
    return embedded


class Attention(nn.Module):
    """Projections of one layer, from inputs of `width`; how keys meet queries differs between training and
    drafting."""

    def __init__(self, config: DrafterShape, width: int) -> None:
        super().__init__()
        style = STYLES[config.style]
        size = config.head_dim
        self.head_dim, self.eps, self.value_norm = size, config.rms_eps, style.value_norm
        self.scale = size**-0.5 if style.scores_by_size else 1.0
        bias = config.attention_bias
        self.q_proj = nn.Linear(width, config.num_heads * size, bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * size, bias)
        self.v_proj = None if config.shared_key_value else nn.Linear(width, config.num_kv_heads * size, bias)
        self.o_proj = nn.Linear(config.num_heads * size, config.hidden_size, bias)
        self.q_norm = RMSNorm(size, config.rms_eps) if style.query_key_norm else None
        self.k_norm = RMSNorm(size, config.rms_eps) if style.query_key_norm else None

    @property
    def value_weight(self) -> Tensor:
        """What projects values: the key projection where the two are shared. [M * D, H]."""
        return self.k_proj.weight if self.v_proj is None else self.v_proj.weight

    def queries(self, q: Tensor, rotation: Rotation) -> Tensor:
        """Projected queries [..., N, D], normalised where the style says so and rotated."""
        return rotate(self.q_norm(q) if self.q_norm is not None else q, *rotation)

    def keys(self, k: Tensor, rotation: Rotation) -> Tensor:
        """Projected keys [..., M, D], normalised where the style says so and rotated."""
        return rotate(self.k_norm(k) if self.k_norm is not None else k, *rotation)

    def values(self, v: Tensor) -> Tensor:
        """Projected values [..., M, D], normalised where the style says so."""
        return F.rms_norm(v, (self.head_dim,), None, self.eps) if self.value_norm else v

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Inputs [..., T, width] to keys and values, both [..., T, M, D]."""
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = k if self.v_proj is None else self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return self.keys(k, rotation), self.values(v)


class MLP(nn.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, size: int, inner: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)
        self.tanh_gelu = activation == "gelu_pytorch_tanh"

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor = self.down_proj(
            (F.gelu(gate, approximate="tanh") if self.tanh_gelu else F.silu(gate)) * up
        )
        return out


class DraftLayer(nn.Module):
    """Pre-norm attention and MLP with residuals; Gemma's has norms after both too, and scales what it gives
    on."""

    def __init__(self, config: DrafterShape, attention_width: int | None = None) -> None:
        super().__init__()
        self.output_norms = STYLES[config.style].output_norms
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.self_attn = Attention(config, attention_width or config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, STYLES[config.style].activation)
        if self.output_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
            self.layer_scalar = nn.Buffer(torch.ones(1))

    def forward(
        self, x_QH: Tensor, context_CH: Tensor, block_rope: Rotation, context_rope: Rotation, plan: BlockPlan
    ) -> Tensor:
        """All blocks of a batch at once: [Q, H] to [Q, H], each block over its part of the context and
        itself."""
        attention, device = self.self_attn, x_QH.device
        q, *own = for_device(DraftLayer.project, device)(self, x_QH, block_rope)
        seen = for_device(Attention.keys_values, device)(attention, context_CH, context_rope)
        mixed = block_attention(q, (own[0], own[1]), seen, plan, attention.scale)
        return for_device(DraftLayer.finish, device)(self, x_QH, mixed.flatten(1))

    def project(self, x_QH: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [Q, N, D], keys and values [Q, M, D] of a block's positions."""
        attention, normed = self.self_attn, self.input_layernorm(x_QH)
        q = attention.queries(attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim)), rotation)
        return q, *attention.keys_values(normed, rotation)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What attention reads of the residual stream [..., H], and what `leave` needs beside it."""
        return self.input_layernorm(x), None

    def leave(self, x: Tensor, attended: Tensor, kept: Tensor | None) -> Tensor:
        """The layer after its attention."""
        return self.finish(x, attended)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer after its attention: residual stream [..., H] and attended values [..., N * D] to [...,
        H]."""
        update = self.self_attn.o_proj(attended)
        if not self.output_norms:
            x = x + update
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(update)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar

"""A lean forward pass of the target over flattened tokens and paged memory, equal to the Transformers module.

Shapes: T tokens, W wanted rows, H hidden, V vocabulary, F = K * H features of K layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.engine.passes import Pass
from draftkit.engine.stack import Layer, Stack, StackShape, pair_rows, rotary_table
from draftkit.target.transformers import TransformersTarget

# Families whose layers are: RMSNorm, attention with rotary halves, residual, RMSNorm, SwiGLU, residual. Biases and norms of
# queries and keys are found in the weights; everything else that a family may do differently excludes it.
FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # fixed frequencies: they do not change with the length


@dataclass(frozen=True)
class ReadOut:
    """Logits [W, V] of the wanted rows and features [T, F] of all rows (None when none were asked for)."""

    logits_WV: Tensor
    features_TF: Tensor | None


def unsupported(target: TransformersTarget) -> str | None:
    """Why the lean forward cannot run this target, or None when it can."""
    config = target.model.config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"family {config.model_type} is not in the table ({', '.join(FAMILIES)})"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        return f"rotary embedding of type {rope.get('rope_type')}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "layers with sliding windows"
    if config.model_type == "mistral" and getattr(config, "sliding_window", None):
        return "layers with sliding windows"
    if getattr(config, "mlp_bias", False):
        return "biases in the MLP"
    return None


class FastModel:
    """Weights taken from a loaded Transformers target (matrices are fused copies; embedding and head are shared)."""

    def __init__(self, target: TransformersTarget, slots: int, max_length: int) -> None:
        model = target.model
        base = getattr(model, model.base_model_prefix)
        config = model.config.get_text_config()
        self.embedding = target.embedding_weight()
        self.head = target.head_weight()
        self.norm = base.norm.weight
        attention = base.layers[0].self_attn
        shape = StackShape(
            hidden=int(config.hidden_size),
            heads=int(config.num_attention_heads),
            kv_heads=int(config.num_key_value_heads),
            head_dim=int(attention.head_dim),
            intermediate=int(config.intermediate_size),
            eps=float(config.rms_norm_eps),
        )
        embedding = base.rotary_emb
        rotary = rotary_table(max_length, embedding.inv_freq, float(embedding.attention_scaling), self.embedding.dtype)
        layers = tuple(fuse_layer(layer, shape) for layer in base.layers)
        self.stack = Stack(shape, layers, rotary.to(self.embedding.device), slots)

    @torch.inference_mode()
    def read(self, step: Pass, wanted: Tensor | None, feature_layers: tuple[int, ...] = ()) -> ReadOut:
        """Read the pass's tokens into the memory. `wanted` are the rows whose logits matter; None means all.

        Features are outputs of the layers `feature_layers` (0-based output ids), concatenated in ascending order.
        """
        x, captured = self.stack.run(F.embedding(step.tokens, self.embedding), step, feature_layers)
        chosen = x if wanted is None else x[wanted]
        logits = F.linear(F.rms_norm(chosen, self.norm.shape, self.norm, self.stack.shape.eps), self.head)
        return ReadOut(logits, torch.cat(captured, -1) if captured else None)


def fuse_layer(layer: Any, shape: StackShape) -> Layer:
    """The weights of one decoder layer of a Transformers module, or of a drafter (same names)."""
    attention, mlp, size = layer.self_attn, layer.mlp, shape.head_dim
    return Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=fuse_qkv(attention, size),
        qkv_bias=_fuse_bias(attention, size),
        qk_norm=fuse_qk_norm(attention, shape),
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
    )


def fuse_qkv(attention: Any, head_dim: int) -> Tensor:
    """[(N + 2 M) D, H] from q_proj, k_proj, v_proj, with queries and keys in pair order."""
    q, k = (pair_rows(p.weight, head_dim) for p in (attention.q_proj, attention.k_proj))
    return torch.cat([q, k, attention.v_proj.weight])


def fuse_qk_norm(attention: Any, shape: StackShape) -> Tensor | None:
    """[N + M, D] in pair order, or None for a family without norms of queries and keys."""
    if getattr(attention, "q_norm", None) is None:
        return None
    q, k = (pair_rows(n.weight, shape.head_dim) for n in (attention.q_norm, attention.k_norm))
    return torch.cat([q.expand(shape.heads, -1), k.expand(shape.kv_heads, -1)])


def _fuse_bias(attention: Any, head_dim: int) -> Tensor | None:
    if attention.q_proj.bias is None:
        return None
    q, k = (pair_rows(p.bias, head_dim) for p in (attention.q_proj, attention.k_proj))
    return torch.cat([q, k, attention.v_proj.bias])

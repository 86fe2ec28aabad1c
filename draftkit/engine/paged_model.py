"""A lean forward pass of the target over flattened tokens and paged memory, equal to the Transformers module.

Shapes: T tokens, W wanted rows, H hidden, V vocabulary, F = K * H features of K layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftkit.draft.families import block_shape
from draftkit.engine.graphs import RecordedPasses
from draftkit.engine.native import Ends, NativeStack
from draftkit.engine.passes import Pass
from draftkit.engine.stack import (
    AttentionShape,
    Indices,
    Layer,
    Stack,
    StackShape,
    pair_rows,
    rms_norm,
    rotary_table,
)
from draftkit.target.transformers import TransformersTarget


@dataclass(frozen=True)
class Family:
    """What the code of a family does that its configuration does not say; all else is found in weights and
    config."""

    output_norms: bool = False  # RMSNorms after attention and MLP too
    norms_from_one: bool = False  # a norm multiplies by 1 + its weight
    value_norm: bool = False


FAMILIES = {
    "qwen3": Family(),
    "qwen2": Family(),
    "llama": Family(),
    "mistral": Family(),
    "gemma2": Family(output_norms=True, norms_from_one=True),
    "gemma3_text": Family(output_norms=True, norms_from_one=True),
    "gemma4_text": Family(output_norms=True, value_norm=True),
}
_FUSED: WeakKeyDictionary[nn.Module, list[Layer]] = WeakKeyDictionary()
# frequencies that do not change with the length
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# parts that change the forward pass and are not written here: configuration field, what it is
_MISSING_PARTS = {
    "mlp_bias": "biases in the MLP",
    "enable_moe_block": "experts",
    "hidden_size_per_layer_input": "embeddings per layer",
    "num_kv_shared_layers": "layers that share keys and values",
    "use_bidirectional_attention": "bidirectional attention",
}


@dataclass(frozen=True)
class ReadOut:
    """Logits [W, V] of the wanted rows and features [T, F] of all rows (None when none were asked for); the
    most likely token of each wanted row, int64 [W], where the pass has found it."""

    logits_WV: Tensor
    features_TF: Tensor | None
    best_W: np.ndarray | None = None


def unsupported(target: TransformersTarget) -> str | None:
    """Why the lean forward cannot run this target, or None when it can."""
    config = target.model.config.get_text_config()
    if len(set(getattr(target.model, "hf_device_map", {}).values())) > 1:
        return "its layers are spread over devices"
    if config.model_type not in FAMILIES:
        return f"family {config.model_type} is not in the table ({', '.join(FAMILIES)})"
    base = getattr(target.model, target.model.base_model_prefix)
    if not hasattr(base, "layers"):
        return f"a text model inside {type(base).__name__}"
    for rope in _rope_types(config):
        if rope not in _ROPE_TYPES:
            return f"rotary embedding of type {rope}"
    if _activation(config) not in _ACTIVATIONS:
        return f"activation {_activation(config)}"
    linear = [m for layer in base.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    # quantised: the weight is not all there is
    kinds = {type(m).__name__ for m in linear if type(m) is not nn.Linear}
    if kinds or not linear:
        return f"layers of type {', '.join(sorted(kinds)) or 'unknown'}"
    return next((what for name, what in _MISSING_PARTS.items() if getattr(config, name, None)), None)


def key_numbers(target: TransformersTarget) -> int:
    """Numbers that a token's keys have in all layers together; its values have as many."""
    config = target.model.config.get_text_config()
    if unsupported(target) is None:
        layers = getattr(target.model, target.model.base_model_prefix).layers
        return sum(int(layer.self_attn.k_proj.out_features) for layer in layers)
    widest = block_shape(config, "llama")
    return int(config.num_hidden_layers) * widest.num_kv_heads * widest.head_dim


class PagedModel:
    """Weights taken from a loaded Transformers target. Its matrices are fused once, for all engines of the
    target, and its module reads the fused ones, too: whoever changes the weights makes a new target."""

    def __init__(self, target: TransformersTarget, slots: int, max_length: int) -> None:
        model = target.model
        base = getattr(model, model.base_model_prefix)
        config = model.config.get_text_config()
        family = FAMILIES[config.model_type]
        self.embedding = target.embedding_weight()
        self.head = target.head_weight()
        self.logit_cap: float | None = getattr(config, "final_logit_softcapping", None)
        dtype = self.embedding.dtype
        scale = getattr(base.embed_tokens, "embed_scale", None)
        self.embedding_scale = float(scale.to(dtype)) if scale is not None else 1.0
        self.norm = _norm_weight(base.norm, family)
        shape = StackShape(int(config.hidden_size), float(config.rms_norm_eps), _activation(config) != "silu")
        tables: dict[str | None, Tensor] = {}
        known = _fused_before(base)
        layers: list[Layer] = []
        for layer in base.layers:
            kind = getattr(layer.self_attn, "layer_type", None)
            kind = kind if hasattr(base.rotary_emb, f"{kind}_inv_freq") else None
            if kind not in tables:
                prefix = f"{kind}_" if kind else ""
                frequencies = getattr(base.rotary_emb, f"{prefix}inv_freq")
                scaling = float(getattr(base.rotary_emb, f"{prefix}attention_scaling"))
                tables[kind] = rotary_table(max_length, frequencies, scaling, dtype).to(self.embedding.device)
            if known:
                layers.append(replace(known[len(layers)], rotary=tables[kind]))
                continue
            layers.append(_fuse(layer, family, tables[kind], config))
            _lend(layer, layers[-1])
        _FUSED[base] = layers
        self.stack = Stack(shape, tuple(layers), slots)
        # one of them is set when it is ready, see compiled.py
        self.native: NativeStack | None = None
        self.recorded: RecordedPasses | None = None

    @property
    def ends(self) -> Ends:
        """What lies before and after the layers."""
        return Ends(self.embedding, self.embedding_scale, self.norm, self.head, logit_cap=self.logit_cap)

    def drop_copies(self) -> None:
        """Let go of the fused matrices once a compiled pass, which has its own, is in use; they are free when
        the target is."""
        if self.native is not None:
            self.stack.drop_weights()
            self.head = self.head.new_empty(0)

    @torch.inference_mode()
    def read(self, step: Pass, wanted: Tensor | None, feature_layers: tuple[int, ...] = ()) -> ReadOut:
        """Read the pass's tokens into the memory. `wanted` are the rows whose logits matter; None means all.

        Features are outputs of the layers `feature_layers` (0-based output ids), concatenated in ascending
        order.
        """
        if self.native is not None:
            rows_W = np.arange(len(step)) if wanted is None else wanted.numpy()
            best_W = np.empty(len(rows_W), np.int64)
            logits_WV, _, features_TF = self.native.run(step, rows_W, feature_layers, best_W)
            return ReadOut(logits_WV, features_TF, best_W)
        if self.recorded is not None and wanted is None and (played := self.recorded.run(step)) is not None:
            logits_WV, *features = played
            # they are kept for long
            return ReadOut(logits_WV, features[0].clone() if features and feature_layers else None)
        logits_WV, *features = self.forward(self.stack.laid(step), wanted, feature_layers)
        return ReadOut(logits_WV, features[0] if features else None)

    def forward(
        self, step: Indices, wanted: Tensor | None, feature_layers: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """`read` in PyTorch operations: logits, and features when there are any."""
        x = F.embedding(step.tokens, self.embedding)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        x, captured = self.stack.run(x, step, feature_layers)
        chosen = x if wanted is None else x[wanted]
        logits = F.linear(rms_norm(chosen, self.norm, self.stack.shape.eps), self.head)
        if self.logit_cap:
            logits = torch.tanh(logits / self.logit_cap) * self.logit_cap
        return (logits, torch.cat(captured, -1)) if captured else (logits,)


def _fuse(layer: Any, family: Family, rotary: Tensor, config: Any) -> Layer:
    module = layer.self_attn
    size = int(module.head_dim)
    attention = AttentionShape(
        heads=module.q_proj.out_features // size,
        kv_heads=module.k_proj.out_features // size,
        head_dim=size,
        scale=float(module.scaling),
        score_cap=getattr(module, "attn_logit_softcapping", None),
        window=_window(module, config),
        value_norm=family.value_norm,
    )
    return fuse_layer(layer, attention, rotary, family.output_norms, partial(_norm_weight, family=family))


def fuse_layer(
    layer: Any, attention: AttentionShape, rotary: Tensor, output_norms: bool, weight: Callable[[Any], Tensor]
) -> Layer:
    """A layer of a target or of a drafter as the stack wants it; `weight` gives what a norm multiplies by."""
    module, size = layer.self_attn, attention.head_dim
    after_attention = weight(layer.post_attention_layernorm)
    qk_norm = None  # [N + M, D] in pair order
    if getattr(module, "q_norm", None) is not None:
        q, k = (pair_rows(weight(norm), size) for norm in (module.q_norm, module.k_norm))
        qk_norm = torch.cat([q.expand(attention.heads, -1), k.expand(attention.kv_heads, -1)])
    return Layer(
        attention=attention,
        rotary=rotary,
        input_norm=weight(layer.input_layernorm),
        qkv=fuse_qkv(module, size),
        qkv_bias=_fuse_bias(module, size),
        qk_norm=qk_norm,
        out=module.o_proj.weight,
        out_bias=module.o_proj.bias,
        post_attention_norm=after_attention if output_norms else None,
        mlp_norm=weight(layer.pre_feedforward_layernorm) if output_norms else after_attention,
        gate_up=torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
        down=layer.mlp.down_proj.weight,
        mlp_out_norm=weight(layer.post_feedforward_layernorm) if output_norms else None,
        output_scale=float(getattr(layer, "layer_scalar", 1.0)),
    )


def _fused_before(base: Any) -> list[Layer]:
    """The fused layers of a module that still reads them: `model.to(...)` gives it others."""
    known = _FUSED.get(base, [])
    pairs = zip(base.layers, known, strict=False)
    return known if all(m.mlp.gate_proj.weight.data_ptr() == f.gate_up.data_ptr() for m, f in pairs) else []


def _lend(layer: Any, fused: Layer) -> None:
    """Let the module read the fused matrices, its own are given back: there may be no room for two copies of
    a large model. Queries and keys are in another order, and stay."""
    module, shape = layer.self_attn, fused.attention
    gate, up = fused.gate_up.chunk(2)
    lent = {layer.mlp.gate_proj: gate, layer.mlp.up_proj: up}
    if module.v_proj is not None:
        lent[module.v_proj] = fused.qkv[-shape.kv_heads * shape.head_dim :]
    for linear, matrix in lent.items():
        linear.weight.data = matrix


def fuse_qkv(attention: Any, head_dim: int) -> Tensor:
    """[(N + 2 M) D, H] from q_proj, k_proj, v_proj (k_proj again where there is none), queries and keys in
    pair order."""
    q, k = (pair_rows(p.weight, head_dim) for p in (attention.q_proj, attention.k_proj))
    values = attention.k_proj if attention.v_proj is None else attention.v_proj
    return torch.cat([q, k, values.weight])


def _fuse_bias(attention: Any, head_dim: int) -> Tensor | None:
    if attention.q_proj.bias is None:
        return None
    q, k = (pair_rows(p.bias, head_dim) for p in (attention.q_proj, attention.k_proj))
    values = attention.k_proj if attention.v_proj is None else attention.v_proj
    return torch.cat([q, k, values.bias])


def _norm_weight(norm: Any, family: Family) -> Tensor:
    """What the norm multiplies by; 1 + weight stays in float32, because bfloat16 would round it."""
    weight: Tensor = norm.weight
    return (
        1.0 + (weight if weight.dtype == torch.float64 else weight.float())
        if family.norms_from_one
        else weight
    )


def _window(module: Any, config: Any) -> int | None:
    """Positions that a layer sees, or None for all of them."""
    if hasattr(module, "sliding_window"):  # qwen2, qwen3 and gemma say it per layer
        return int(module.sliding_window) if module.sliding_window else None
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return int(window) if window else None


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _rope_types(config: Any) -> set[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return {str(kind.get("rope_type", "default")) for kind in kinds}

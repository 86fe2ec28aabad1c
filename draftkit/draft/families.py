"""What a drafter takes over from its target's family: a table of block styles, and the sizes in the target's
configuration.

The style is what a decoder block does differently; everything else is a number. Any causal language model
gets the Qwen3 block, which engines load in front of every target; Gemma 4 has a block of its own, which they
load as well. The Llama block is EAGLE-3's, and there to be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftkit.draft.rotary import SCALED, scaling_of
from draftkit.errors import ConfigError


@dataclass(frozen=True)
class Style:
    """How one family's decoder block differs from a pre-norm block with SwiGLU."""

    query_key_norm: bool = True  # RMSNorm with weights over the head size, before the rotary embedding
    value_norm: bool = False  # RMSNorm without weights over the head size
    scores_by_size: bool = True  # attention scores are divided by sqrt(head size)
    # RMSNorms after attention and MLP too, and a scalar buffer on the layer's output
    output_norms: bool = False
    scaled_embedding: bool = False  # times sqrt(hidden size)
    activation: str = "silu"


STYLES = {
    "qwen3": Style(),
    "llama": Style(query_key_norm=False),
    "gemma4": Style(
        value_norm=True,
        scores_by_size=False,
        output_norms=True,
        scaled_embedding=True,
        activation="gelu_pytorch_tanh",
    ),
}
STYLE_OF_FAMILY = dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), "gemma4")
PLAIN_STYLE = "qwen3"
EAGLE_STYLE = "llama"  # what every engine loads as EAGLE-3, in front of any target


@dataclass(frozen=True)
class BlockShape:
    """The numbers of a drafter's block that follow from its target; names are those of `DrafterConfig`."""

    style: str
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    shared_key_value: bool
    rms_eps: float
    rope_theta: float
    rotary_share: float
    logit_scale: float
    soft_cap: float | None
    rope_scaling: dict[str, Any] | None = None


def style_of(family: str) -> str:
    """The block style for a target by its `model_type`."""
    return STYLE_OF_FAMILY.get(family, PLAIN_STYLE)


def block_shape(text: Any, style: str) -> BlockShape:
    """Read a target's Transformers text configuration for a drafter of `style`.

    Raises ConfigError for an unknown style.
    """
    if style not in STYLES:
        raise ConfigError(f"drafter.style: {style!r} is not known, choose auto or one of {', '.join(STYLES)}")
    heads = text.num_attention_heads
    attention = _widest_layer(text)
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return BlockShape(
        style=style,
        intermediate_size=_first(text, "intermediate_size", "ffn_dim", "n_inner") or 4 * text.hidden_size,
        num_heads=heads,
        num_kv_heads=_first(attention, "num_key_value_heads") or heads,
        head_dim=_first(attention, "head_dim") or text.hidden_size // heads,
        shared_key_value=style == "gemma4" and bool(getattr(text, "attention_k_eq_v", False)),
        rms_eps=_first(text, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") or 1e-6,
        rope_theta=float(rope.get("rope_theta") or _first(text, "rope_theta") or 10_000.0),
        rotary_share=float(rope.get("partial_rotary_factor", 1.0)) if style == "gemma4" else 1.0,
        logit_scale=float(_first(text, "logit_scale") or 1 / (_first(text, "logits_scaling") or 1)),
        soft_cap=_first(text, "final_logit_softcapping"),
        rope_scaling=_scaling(rope) if style != "gemma4" else None,
    )


def _scaling(rope: Any) -> dict[str, Any] | None:
    """The target's own scaling, where a drafter can have it: angles that change with the length it cannot."""
    return scaling_of(rope) if rope.get("rope_type") in SCALED else None


def _widest_layer(text: Any) -> Any:
    """The configuration of the first layer that attends to the whole context; its geometry is the drafter's.

    Only Gemma 4 and a few others have layers of several geometries.
    """
    layers = getattr(text, "per_layer_config", None)
    if not layers:
        return text
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    return layers[kinds.index("full_attention") if "full_attention" in kinds else 0]


def _first(config: Any, *names: str) -> Any:
    """The first of these attributes that is there and not None."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

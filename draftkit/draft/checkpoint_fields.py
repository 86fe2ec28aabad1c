"""Fields of a drafter's `config.json`: typed reading, and the sizes that all forms share.

A form's block is a style of `families.py`; Qwen3's and Llama's blocks have the same fields, Gemma 4's has its
own (what its full-attention layers use: `global_head_dim`, `num_global_key_value_heads`, rotary embeddings of
type "proportional").
"""

from __future__ import annotations

from typing import Any, TypeVar

from draftkit.draft.drafter import DrafterShape
from draftkit.draft.families import STYLES
from draftkit.draft.rotary import scaling_of
from draftkit.errors import CheckpointError

T = TypeVar("T", int, float, bool, str)


class Fields:
    """A `config.json` or a section of it, read field by field; CheckpointError names the file and the
    field."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}: is a {type(raw).__name__}, must be a mapping")
        self.raw, self.where = raw, where

    @property
    def architecture(self) -> str:
        """The first of the architectures, or "nothing"."""
        names = self.raw.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else "nothing"

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The field's value; a field that is missing or null has the default, if there is one."""
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where}: field '{name}' is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(
                f"{self.where}: field '{name}' is {value!r}, must be of type {kind.__name__}"
            )
        return value

    def optional(self, name: str, kind: type[T]) -> T | None:
        """The field's value, None when it is missing or null."""
        return None if self.raw.get(name) is None else self.get(name, kind)

    def ids(self, name: str) -> tuple[int, ...] | None:
        """A list of integers, None when it is missing."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise CheckpointError(f"{self.where}: field '{name}' is {value!r}, must be a list of integers")
        return tuple(value)

    def wanted_ids(self, name: str) -> tuple[int, ...]:
        """A list of integers that must be there."""
        found = self.ids(name)
        if not found:
            raise CheckpointError(f"{self.where}: field '{name}' is missing")
        return found

    def section(self, name: str) -> Fields:
        """A nested mapping, empty when it is missing."""
        return Fields(self.raw.get(name) or {}, f"{self.where}: {name}")

    def demand(self, name: str, *allowed: object) -> None:
        """Raise CheckpointError unless the field is missing or has one of the values that are implemented."""
        value = self.raw.get(name)
        if value is not None and value not in allowed:
            runs = " or ".join(map(repr, allowed)) or "no such field"
            raise CheckpointError(f"{self.where}: field '{name}' is {value!r}; draftkit runs {runs}")


def read_sizes(fields: Fields, style: str, num_target_layers: int | None) -> dict[str, Any]:
    """The fields of `DrafterShape` but feature layers and block size; `num_target_layers` where the file
    lacks it.

    Raises CheckpointError for a field that is missing, of a wrong type, or asks for what is not implemented.
    """
    for name in ("mlp_bias", "enable_moe_block", "use_double_wide_mlp"):
        fields.demand(name, False)
    if style == "gemma4":
        fields.demand("attention_bias", False)
        demand_full_attention(fields)
    fields.demand("hidden_size_per_layer_input", 0)
    if num_target_layers is None and fields.raw.get("num_target_layers") is None:
        raise CheckpointError(
            f"{fields.where}: does not say 'num_target_layers'; give its target too (--target)"
        )
    heads = fields.get("num_attention_heads", int)
    sizes = {
        "style": style,
        "hidden_size": fields.get("hidden_size", int),
        "intermediate_size": fields.get("intermediate_size", int),
        "num_layers": fields.get("num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", int, heads),
        "vocab_size": fields.get("vocab_size", int),
        "num_target_layers": fields.get("num_target_layers", int, num_target_layers),
        "rms_eps": fields.get("rms_norm_eps", float),
        "logit_scale": fields.get("logit_scale", float, DrafterShape.logit_scale),
        "soft_cap": fields.optional("final_logit_softcapping", float),
        "max_length": fields.get("max_position_embeddings", int),
        "attention_bias": fields.get("attention_bias", bool, False),
    }
    return sizes | (_read_gemma(fields) if style == "gemma4" else _read_plain(fields))


def demand_full_attention(fields: Fields) -> None:
    """Raise CheckpointError where a layer is of another type."""
    other = [kind for kind in fields.raw.get("layer_types") or [] if kind != "full_attention"]
    if other:
        raise CheckpointError(
            f"{fields.where}: field 'layer_types' has {other[0]!r}; draftkit runs full_attention layers here"
        )


def read_dflash(fields: Fields, nested: Fields) -> dict[str, Any]:
    """What DFlash and DFlash2 say alike, `nested` being their `dflash_config`: fields of a DrafterConfig."""
    return {
        "feature_layers": nested.ids("target_layer_ids") or fields.wanted_ids("target_layer_ids"),
        "mask_token_id": nested.get("mask_token_id", int, fields.raw.get("mask_token_id")),
        "block_size": nested.get("block_size", int, fields.raw.get("block_size")),
        "layout": "one_plus_n",
        "head": "none",
        "markov_rank": 0,
        "confidence": False,
        "confidence_with_markov": False,
        "layer_attention": read_layer_attention(fields, nested),
    }


def read_layer_attention(fields: Fields, nested: Fields) -> tuple[tuple[int | None, bool], ...] | None:
    """Each layer's sliding window and whether it is causal, None where all layers see everything. As vLLM
    reads them: a layer is sliding by `layer_types`, or all are by `use_swa`; sliding layers are causal where
    nothing says otherwise (`is_causal`, then `dflash_config.causal`)."""
    for section, name in ((fields, "add_swa_attention_sink_bias"), (nested, "attention_sink_bias")):
        section.demand(name, False)
    nested.demand("attention_value_scale", 1.0)
    layers = fields.get("num_hidden_layers", int)
    kinds = fields.raw.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if kinds is not None and (len(kinds) != layers or any(kind not in known for kind in kinds)):
        raise CheckpointError(
            f"{fields.where}: field 'layer_types' is {kinds!r}, must be {layers} of {', '.join(known)}"
        )
    by_type = [kind == "sliding_attention" for kind in kinds or ()]
    sliding = by_type if any(by_type) else [nested.get("use_swa", bool, False)] * layers
    causal = fields.optional("is_causal", bool)
    causal = nested.optional("causal", bool) if causal is None else causal
    window = nested.get("swa_window_size", int, fields.raw.get("sliding_window")) if any(sliding) else None
    if window is not None and window < 1:
        raise CheckpointError(f"{fields.where}: the sliding window is {window}, must be 1 or more")
    legacy = by_type or [False] * layers
    found = tuple(
        (window if slides else None, typed if causal is None else causal)
        for slides, typed in zip(sliding, legacy, strict=True)
    )
    return found if any(one != (None, False) for one in found) else None


def _read_plain(fields: Fields) -> dict[str, Any]:
    fields.demand("hidden_act", "silu")
    rope = fields.section("rope_parameters")
    return {
        "rope_scaling": scaling_of(rope.raw) or scaling_of(fields.section("rope_scaling").raw),
        "head_dim": fields.get(
            "head_dim", int, fields.get("hidden_size", int) // fields.get("num_attention_heads", int)
        ),
        "rope_theta": fields.get("rope_theta", float, rope.get("rope_theta", float, DrafterShape.rope_theta)),
    }


def _read_gemma(fields: Fields) -> dict[str, Any]:
    fields.demand("hidden_activation", "gelu_pytorch_tanh")
    fields.demand("rope_scaling")
    rope = fields.section("rope_parameters").section("full_attention")
    rope.demand("rope_type", "proportional", "default")
    shared = fields.get("attention_k_eq_v", bool, False)
    wide = fields.section("per_layer_config").section("0")  # how newer Transformers write what follows
    sizes = {
        "head_dim": fields.get("global_head_dim", int, wide.get("head_dim", int, fields.raw.get("head_dim"))),
        "rope_theta": rope.get("rope_theta", float),
        "rotary_share": rope.get("partial_rotary_factor", float, DrafterShape.rotary_share),
        "shared_key_value": shared,
    }
    if shared:
        own = wide.get("num_key_value_heads", int, fields.raw.get("num_key_value_heads"))
        sizes["num_kv_heads"] = fields.get("num_global_key_value_heads", int, own)
    return sizes


def write_sizes(config: DrafterShape, architecture: str, model_type: str) -> dict[str, Any]:
    """The fields that all forms share; null is left out."""
    common = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "attention_bias": config.attention_bias,
        "rms_norm_eps": config.rms_eps,
        "max_position_embeddings": config.max_length,
        "layer_types": ["full_attention"] * config.num_layers,
        "tie_word_embeddings": False,
        "num_target_layers": config.num_target_layers,
    }
    if config.logit_scale != DrafterShape.logit_scale:
        common["logit_scale"] = config.logit_scale
    if config.soft_cap is not None:
        common["final_logit_softcapping"] = config.soft_cap
    return common | (_write_gemma(config) if config.style == "gemma4" else _write_plain(config))


def _write_plain(config: DrafterShape) -> dict[str, Any]:
    return {
        "hidden_act": STYLES[config.style].activation,
        "rope_theta": config.rope_theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            **(config.rope_scaling or {}),
        },
        **({"rope_scaling": config.rope_scaling} if config.rope_scaling else {}),
    }


def _write_gemma(config: DrafterShape) -> dict[str, Any]:
    rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_share}
    return {
        "target_model_type": "gemma4",
        "target_text_model_type": "gemma4_text",
        "hidden_activation": STYLES[config.style].activation,
        "global_head_dim": config.head_dim,
        "num_global_key_value_heads": config.num_kv_heads,
        "attention_k_eq_v": config.shared_key_value,
        "attention_dropout": 0.0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional"} | rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }

"""DSpark modules of DeepSeek-V4 in files: DeepSeek's names under `mtp.*`, in a folder of their own or within
the target's checkpoint, FP8 and packed FP4 or not.

A folder of our own has the architecture DeepseekV4DSparkModel (no engine knows it: `draftkit export` writes
what they load); the target's own has DeepseekV4ForCausalLM and `dspark_*` keys, and is read as a drafter,
too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from draftkit.draft.checkpoint_fields import Fields
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter
from draftkit.draft.deepseek_v4_shape import DeepseekV4Shape
from draftkit.errors import CheckpointError, TargetError
from draftkit.target.deepseek_v4 import Place, is_draft, place_in_block
from draftkit.target.deepseek_v4_check import Found, by_known_name, mismatches
from draftkit.target.deepseek_v4_tensors import Sizes, TensorSpec, draft_tensors, has_draft_module
from draftkit.target.fp8_fp4 import dequantise_fp4, dequantise_fp8

OWN, BUNDLED = "DeepseekV4DSparkModel", "DeepseekV4ForCausalLM"
_TYPES = {  # safetensors' names
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
STYLES = {OWN: "deepseek_v4", BUNDLED: "deepseek_v4"}


def read_sizes(fields: Fields, style: str, num_target_layers: int | None) -> dict[str, Any]:
    """The fields of the shape from a V4 `config.json`. Raises CheckpointError for a checkpoint without a
    DSpark module."""
    if not has_draft_module(fields.raw):
        raise CheckpointError(
            f"{fields.where}: has no dspark_* keys: a preview checkpoint without a DSpark module; give one "
            "with it (DeepSeek-V4-Flash-0731, -Pro-0813, *-DSpark)"
        )
    head = fields.get("head_dim", int)
    share = fields.get("partial_rotary_factor", float, 0.125)
    return {
        "style": style,
        "hidden_size": fields.get("hidden_size", int),
        "intermediate_size": fields.get("moe_intermediate_size", int),
        "num_layers": _stages(fields),
        "num_heads": fields.get("num_attention_heads", int),
        "num_kv_heads": 1,
        "head_dim": head,
        "vocab_size": fields.get("vocab_size", int),
        "num_target_layers": fields.get("num_hidden_layers", int),
        "rms_eps": fields.get("rms_norm_eps", float),
        "rope_theta": fields.get("rope_theta", float),
        "max_length": fields.get("max_position_embeddings", int),
        "q_lora_rank": fields.get("q_lora_rank", int),
        "rope_dim": fields.get("qk_rope_head_dim", int, int(head * share)),
        "o_groups": fields.get("o_groups", int),
        "o_lora_rank": fields.get("o_lora_rank", int),
        "num_experts": fields.get("n_routed_experts", int),
        "experts_per_token": fields.get("num_experts_per_tok", int),
        "routed_scaling": fields.get("routed_scaling_factor", float),
        "scoring": fields.get("scoring_func", str, "sqrtsoftplus"),
        "swiglu_limit": fields.get("swiglu_limit", float),
        "streams": fields.get("hc_mult", int),
        "sinkhorn_iters": fields.get("hc_sinkhorn_iters", int),
        "hc_eps": fields.get("hc_eps", float),
        "window": fields.get("sliding_window", int),
    }


def read_shape(fields: Fields, sizes: dict[str, Any]) -> DeepseekV4Shape:
    """The shape of the module that a V4 `config.json` describes."""
    fields.demand("dspark_markov_head_type", "vanilla")
    fields.demand("sample_from_anchor", True)
    return DeepseekV4Shape(
        **sizes,
        feature_layers=fields.wanted_ids("dspark_target_layer_ids"),
        block_size=fields.get("dspark_block_size", int),
        mask_token_id=fields.get("dspark_noise_token_id", int),
        markov_rank=fields.get("dspark_markov_rank", int),
        confidence_with_markov=fields.get("confidence_head_with_markov", bool, True),
    )


def draft_fields(config: DeepseekV4Shape) -> dict[str, Any]:
    """The keys of `config.json` that say that there is a module, and which."""
    return {
        "dspark_block_size": config.block_size,
        "dspark_noise_token_id": config.mask_token_id,
        "dspark_target_layer_ids": list(config.feature_layers),
        "dspark_markov_rank": config.markov_rank,
        "n_mtp_layers": config.num_layers,
    }


def write_fields(config: DeepseekV4Shape) -> dict[str, Any]:
    """`config.json` of a folder of our own; `num_hidden_layers` is the target's, as in its own file."""
    return draft_fields(config) | {
        "architectures": [OWN],
        "model_type": "deepseek_v4",
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_target_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "qk_rope_head_dim": config.rope_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_length,
        "q_lora_rank": config.q_lora_rank,
        "o_groups": config.o_groups,
        "o_lora_rank": config.o_lora_rank,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "routed_scaling_factor": config.routed_scaling,
        "scoring_func": config.scoring,
        "swiglu_limit": config.swiglu_limit,
        "hc_mult": config.streams,
        "hc_sinkhorn_iters": config.sinkhorn_iters,
        "hc_eps": config.hc_eps,
        "sliding_window": config.window,
        "confidence_head_with_markov": config.confidence_with_markov,
        "tie_word_embeddings": False,
    }


def place_of(name: str) -> Place:
    """Where a tensor of the checkpoint (`mtp.1.attn.wq_a.weight`) lies in `DeepseekV4Drafter`."""
    _, stage, rest = name.split(".", 2)
    if rest.startswith("hc_head_"):
        return Place(rest.replace("hc_head_", "hc_head.hc_"))
    if rest.startswith(("main_", "norm.", "markov_head.", "confidence_head.")):
        return Place(rest)
    place = place_in_block(rest)
    return Place(f"stages.{stage}.{place.name}", place.expert, place.part)


def to_checkpoint(tensors: Mapping[str, Tensor], config: DeepseekV4Shape) -> dict[str, Tensor]:
    """A drafter's tensors by DeepSeek's names, as floats; embedding and head are left to the target."""
    return {
        name: place_of(name).part_of(tensors[place_of(name).name]).contiguous()
        for name in tensor_specs(config)
    }


def from_checkpoint(tensors: Mapping[str, Tensor], config: DeepseekV4Shape) -> dict[str, Tensor]:
    """DeepSeek's tensors, dequantised where they have scales, by our names.

    Raises CheckpointError that lists all that is missing, unknown or of another shape or type.
    """
    found = {
        name: Found(name, tuple(t.shape), _TYPES.get(t.dtype, str(t.dtype)))
        for name, t in tensors.items()
        if is_draft(name)
    }
    wanted = draft_tensors(_raw(config))
    if wrong := mismatches(wanted, found):
        raise CheckpointError(f"the draft module's tensors do not fit its configuration: {'; '.join(wrong)}")
    known = by_known_name(wanted, found)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in DeepseekV4Drafter(config).state_dict().items()}
    own: dict[str, Tensor] = {}
    for name in tensor_specs(config):
        scale = known.get(name.removesuffix("weight") + "scale")
        value = _as_floats(tensors[known[name].name], tensors[scale.name] if scale else None)
        place = place_of(name)
        whole = own.setdefault(place.name, torch.empty(shapes[place.name], dtype=value.dtype))
        place.part_of(whole).copy_(value)
    return own


def tensor_specs(config: DeepseekV4Shape) -> dict[str, TensorSpec]:
    """The module's tensors but for scales, as `config.json` of the checkpoint gives them."""
    return {name: spec for name, spec in draft_tensors(_raw(config)).items() if not name.endswith(".scale")}


def _raw(config: DeepseekV4Shape) -> dict[str, Any]:
    return write_fields(config) | {"compress_ratios": [0] * config.num_target_layers, "num_hash_layers": 0}


def _stages(fields: Fields) -> int:
    try:
        return Sizes(fields.raw).stages
    except TargetError as error:
        raise CheckpointError(f"{fields.where}: {error}") from error


def _as_floats(tensor: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return tensor
    return (dequantise_fp4 if tensor.dtype == torch.int8 else dequantise_fp8)(tensor, scale)

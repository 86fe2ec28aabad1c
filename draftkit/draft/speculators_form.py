"""The form of the speculators library (Red Hat's releases): its `config.json` said in the fields of the
other forms.

A nested `transformer_layer_config` holds the block's sizes; layer ids count hidden states (output + 1);
flags have defaults of their own. Tensors have the usual names, layers as `layers.N`. Source: speculators
0.9 as vLLM 0.33 and llama.cpp read it.

| speculators_model_type | becomes | drafts |
|---|---|---|
| dspark | Qwen3DSparkModel | as `sample_from_anchor` says, which must be written: defaults differ |
| dflash | DFlashDraftModel | 1 + N |
| dflash2 | DFlash2DraftModel | 1 + N, through its selector |
| xpress | Qwen3XPressModel | 1 + N, or as `sample_from_anchor` says |
| eagle3 | LlamaForCausalLMEagle3, Eagle3Qwen3ForCausalLM by its block's model_type | token by token |
"""

from __future__ import annotations

from typing import Any

from draftkit.draft.checkpoint_fields import Fields
from draftkit.errors import CheckpointError

KNOWN = ("dspark", "dflash", "dflash2", "xpress", "eagle3")
_PARTS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")  # of dflash2
_BLOCKS = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel", "xpress": "Qwen3XPressModel"}
_EAGLES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}
_KEPT = (
    "draft_vocab_size mask_token_id block_size markov_rank markov_head_type enable_confidence_head "
    "num_target_layers "
    "confidence_head_with_markov sample_from_anchor norm_before_fc fc_norm norm_output target_hidden_size "
    "quantization_config"
).split()


def is_speculators(fields: Fields) -> bool:
    """Whether a `config.json` is of this form."""
    return bool(fields.raw.get("speculators_model_type"))


def from_speculators(fields: Fields) -> Fields:
    """The same drafter in the fields of the form that `architectures` then names. Raises CheckpointError
    for another kind than KNOWN, or where its block or its layers are not said."""
    kind = fields.get("speculators_model_type", str)
    if kind not in KNOWN:
        raise CheckpointError(
            f"{fields.where}: speculators_model_type {kind!r} is not known; known are {', '.join(KNOWN)}"
        )
    block = fields.section("transformer_layer_config")
    if not block.raw:
        raise CheckpointError(f"{fields.where}: field 'transformer_layer_config' is missing")
    flat = dict(block.raw) | {name: fields.raw[name] for name in _KEPT if name in fields.raw}
    if "sliding_attention" in (block.raw.get("layer_types") or []):
        flat["is_causal"] = not fields.get("sliding_window_non_causal", bool, True)
    flat |= _eagle(fields, block) if kind == "eagle3" else _blocks(fields, block, kind)
    return Fields(flat, fields.where)


def _drafted(fields: Fields) -> int | None:
    """Drafted tokens per round, as the first proposal method says."""
    methods = fields.section("speculators_config").raw.get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods and isinstance(methods[0], dict) else {}
    return Fields(first, f"{fields.where}: proposal_methods").optional("speculative_tokens", int)


def _eagle(fields: Fields, block: Fields) -> dict[str, Any]:
    style = block.get("model_type", str, "llama")
    if style not in _EAGLES:
        raise CheckpointError(
            f"{block.where}: model_type {style!r} is not known for EAGLE-3; known are {', '.join(_EAGLES)}"
        )
    counted, drafted = fields.ids("eagle_aux_hidden_state_layer_ids"), _drafted(fields)
    return {
        "architectures": [_EAGLES[style]],
        "norm_before_residual": fields.get("norm_before_residual", bool, True),
        **({"eagle_aux_hidden_state_layer_ids": list(counted)} if counted else {}),
        **({"ttt_length": drafted} if drafted else {}),
    }


def _blocks(fields: Fields, block: Fields, kind: str) -> dict[str, Any]:
    outputs = [i - 1 for i in fields.wanted_ids("aux_hidden_state_layer_ids")]
    if kind == "dspark":
        return {
            "architectures": ["Qwen3DSparkModel"],
            "target_layer_ids": outputs,
            "sample_from_anchor": fields.get(
                "sample_from_anchor", bool
            ),  # vLLM and the library guess otherwise
            "enable_confidence_head": fields.get("enable_confidence_head", bool, True),
        }
    nested = {"mask_token_id": fields.get("mask_token_id", int), "target_layer_ids": outputs}
    if kind == "dflash2":
        nested |= {name: fields.get(name, int) for name in _PARTS}
    refiner = _refiner(fields) if kind == "xpress" else {}
    return {"architectures": [_BLOCKS[kind]], "dflash_config": nested, **refiner}


def _refiner(fields: Fields) -> dict[str, Any]:
    fields.demand("xpress_backbone", "dflash")
    fields.demand("xpress_selector", False)
    rank = fields.get("xpress_rank", int, 256)
    return {
        "xpress_rank": rank,
        "xpress_mlp_hidden": rank * fields.get("xpress_mlp_ratio", int, 2),
        "xpress_num_passes": fields.get("num_jacobi_passes", int, 6),
    }

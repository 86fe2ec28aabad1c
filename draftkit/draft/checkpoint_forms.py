"""The forms in which drafters circulate: what their `config.json` says, and how their tensors are called.

| architecture                                   | drafter                  | embedding, head         | layer ids           |
| Qwen3DSparkModel, Gemma4DSparkModel (DeepSpec) | DSpark, DFlash           | own, or borrowed        | target_layer_ids: i |
| LlamaDSparkModel (ours, no engine knows it)    | the same, Llama's block  | own, or borrowed        | target_layer_ids: i |
| DFlashDraftModel (z-lab)                       | DFlash 1+N               | the target's            | target_layer_ids: i |
| LlamaForCausalLMEagle3, Eagle3Qwen3ForCausalLM | EAGLE-3, the second with | own, or borrowed; a re- | top level: i + 1,   |
|                                                | q/k norms                | duced head is its own   | eagle_config: i     |
| Qwen3Eagle3Model, Gemma4Eagle3Model (DeepSpec) | EAGLE-3                  | own, or borrowed        | target_layer_ids: i |

i is a layer OUTPUT index; i + 1 counts the embedding as 0, as Transformers' `hidden_states` does. vLLM and llama.cpp read
the top-level ids of EAGLE-3, SGLang the nested ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from draftkit.draft.checkpoint_fields import Fields, read_sizes, write_sizes
from draftkit.draft.drafter import DrafterConfig, DrafterShape
from draftkit.draft.eagle3 import EagleConfig
from draftkit.errors import CheckpointError

FORMS = ("portable", "deepspec")
_HEADS = {"vanilla": "markov", "gated": "gated", "rnn": "rnn"}
_BLOCKS = {"Qwen3DSparkModel": "qwen3", "Gemma4DSparkModel": "gemma4", "LlamaDSparkModel": "llama"}
_DFLASH = "DFlashDraftModel"
_EAGLES = {"LlamaForCausalLMEagle3": "llama", "Eagle3Qwen3ForCausalLM": "qwen3"}
_DEEPSPEC_EAGLES = {"Qwen3Eagle3Model": "qwen3", "Gemma4Eagle3Model": "gemma4"}
_OTHER_NAMES = {"Eagle3LlamaForCausalLM": "LlamaForCausalLMEagle3", "DSparkDraftModel": "Qwen3DSparkModel"}
_MODEL_TYPES = {"qwen3": "qwen3", "gemma4": "gemma4_text", "llama": "llama"}


def read_shape(fields: Fields, num_target_layers: int | None) -> DrafterShape:
    """A drafter's shape from any known form; `num_target_layers` helps where the form does not say it.

    Raises CheckpointError that names the architecture or the field that is missing, wrong or not implemented.
    """
    known = [*_BLOCKS, _DFLASH, *_EAGLES, *_DEEPSPEC_EAGLES]
    if fields.raw.get("speculators_model_type"):
        raise CheckpointError(f"{fields.where}: the speculators form is not known; known are {', '.join(known)}")
    architecture = _OTHER_NAMES.get(fields.architecture, fields.architecture)
    if architecture in _BLOCKS:
        return _read_dspark(fields, read_sizes(fields, _BLOCKS[architecture], num_target_layers))
    if architecture == _DFLASH:
        return _read_dflash(fields, read_sizes(fields, "qwen3", num_target_layers))
    if architecture in _EAGLES:
        return _read_eagle(fields, read_sizes(fields, _EAGLES[architecture], num_target_layers))
    if architecture in _DEEPSPEC_EAGLES:
        return _read_deepspec_eagle(fields, read_sizes(fields, _DEEPSPEC_EAGLES[architecture], num_target_layers))
    raise CheckpointError(f"{fields.where}: architecture {architecture} is not known; known are {', '.join(known)}")


def _read_dspark(fields: Fields, sizes: dict[str, Any]) -> DrafterConfig:
    rank = fields.get("markov_rank", int, 0)
    kind = fields.get("markov_head_type", str, "vanilla")
    if kind not in _HEADS:
        raise CheckpointError(f"{fields.where}: markov_head_type {kind!r} is not known; known are {', '.join(_HEADS)}")
    return DrafterConfig(
        **sizes,
        feature_layers=fields.wanted_ids("target_layer_ids"),
        mask_token_id=fields.get("mask_token_id", int),
        block_size=fields.get("block_size", int),
        layout="anchor" if fields.get("sample_from_anchor", bool, True) else "one_plus_n",
        head=_HEADS[kind] if rank else "none",
        markov_rank=rank,
        confidence=fields.get("enable_confidence_head", bool, False),
        confidence_with_markov=fields.get("confidence_head_with_markov", bool, True) and rank > 0,
        window=fields.optional("context_window", int),
    )


def _read_dflash(fields: Fields, sizes: dict[str, Any]) -> DrafterConfig:
    nested = fields.section("dflash_config")
    for name in ("causal", "use_swa", "attention_sink_bias"):
        nested.demand(name, False)
    for name in ("output_multiplier", "input_embedding_scale"):
        nested.demand(name, 1.0)
    sizes["soft_cap"] = nested.optional("final_logit_softcapping", float)
    return DrafterConfig(
        **sizes,
        feature_layers=nested.ids("target_layer_ids") or fields.wanted_ids("target_layer_ids"),
        mask_token_id=nested.get("mask_token_id", int, fields.raw.get("mask_token_id")),
        block_size=nested.get("block_size", int, fields.raw.get("block_size")),
        layout="one_plus_n",
        head="none",
        markov_rank=0,
        confidence=False,
        confidence_with_markov=False,
        window=fields.optional("context_window", int),
    )


def _read_eagle(fields: Fields, sizes: dict[str, Any]) -> EagleConfig:
    for name in ("norm_before_fc", "fc_norm", "norm_output"):
        fields.demand(name, False)
    fields.demand("target_hidden_size", sizes["hidden_size"])
    whole = sizes["vocab_size"]
    reduced = fields.get("draft_vocab_size", int, whole)
    return EagleConfig(
        **sizes,
        feature_layers=_eagle_layers(fields, sizes["num_target_layers"]),
        block_size=fields.get("ttt_length", int, DrafterShape.block_size),
        draft_vocab_size=reduced if reduced != whole else None,
        norm_before_residual=fields.get("norm_before_residual", bool, False),
    )


def _eagle_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """OUTPUT indices, from whichever place names the layers; EAGLE-3's default counts hidden states."""
    if (counted := fields.ids("eagle_aux_hidden_state_layer_ids")) is not None:
        return tuple(i - 1 for i in counted)
    if (nested := fields.section("eagle_config").ids("eagle_aux_hidden_state_layer_ids")) is not None:
        return nested
    return (1, layers // 2 - 1, layers - 4)


def _read_deepspec_eagle(fields: Fields, sizes: dict[str, Any]) -> EagleConfig:
    return EagleConfig(
        **sizes, feature_layers=fields.wanted_ids("target_layer_ids"), block_size=fields.get("ttt_length", int)
    )


def write_shape(config: DrafterShape, form: str) -> dict[str, Any]:
    """`config.json` in a form of FORMS. Raises CheckpointError when the form cannot hold this drafter."""
    if form not in FORMS:
        raise CheckpointError(f"form {form!r} is not known; choose one of {', '.join(FORMS)}")
    if isinstance(config, EagleConfig):
        portable = form == "portable" and config.style in _EAGLES.values()
        return _write_eagle(config) if portable else _write_deepspec_eagle(config)
    if not isinstance(config, DrafterConfig):
        raise TypeError(f"{type(config).__name__}: has no form")
    if form == "deepspec" and (config.layout != "anchor" or config.style == "llama"):
        raise CheckpointError("DeepSpec has the anchor layout alone, and no Llama block; write the portable form")
    if config.layout == "one_plus_n" and config.algorithm == "dflash" and config.style == "qwen3":
        return _write_dflash(config)
    return _write_dspark(config)


def _architecture(styles: dict[str, str], config: DrafterShape) -> tuple[str, str]:
    """The architecture of a style, and Transformers' name of its model type."""
    return next(name for name, style in styles.items() if style == config.style), _MODEL_TYPES[config.style]


def _write_dspark(config: DrafterConfig) -> dict[str, Any]:
    names = {v: k for k, v in _HEADS.items()}
    fields = write_sizes(config, *_architecture(_BLOCKS, config)) | {
        "block_size": config.block_size,
        "target_layer_ids": list(config.feature_layers),
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.layout == "anchor",
        "markov_rank": config.markov_rank if config.head != "none" else 0,
        "markov_head_type": names.get(config.head, "vanilla"),
        "enable_confidence_head": config.confidence,
        "confidence_head_with_markov": config.confidence_with_markov and config.head != "none",
        "num_anchors": 512,  # DeepSpec's class asks for it and uses it in training alone
    }
    return fields | _window(config)


def _write_dflash(config: DrafterConfig) -> dict[str, Any]:
    nested: dict[str, Any] = {"mask_token_id": config.mask_token_id, "target_layer_ids": list(config.feature_layers)}
    fields = write_sizes(config, _DFLASH, "qwen3") | {"block_size": config.block_size, "dflash_config": nested}
    if "final_logit_softcapping" in fields:
        nested["final_logit_softcapping"] = fields.pop("final_logit_softcapping")
    return fields | _window(config)


def _window(config: DrafterConfig) -> dict[str, Any]:
    """A field of ours: an engine that does not know it lets the drafter see the whole context, which loses nothing."""
    return {"context_window": config.window} if config.window else {}


def _write_eagle(config: EagleConfig) -> dict[str, Any]:
    layers = list(config.feature_layers)
    return write_sizes(config, *_architecture(_EAGLES, config)) | {
        "draft_vocab_size": config.head_size,
        "norm_before_residual": config.norm_before_residual,
        "num_aux_hidden_states": len(layers),
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in layers],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers},
        "ttt_length": config.block_size,
    }


def _write_deepspec_eagle(config: EagleConfig) -> dict[str, Any]:
    if config.style not in _DEEPSPEC_EAGLES.values() or config.draft_vocab_size or config.norm_before_residual:
        raise CheckpointError(
            "DeepSpec's EAGLE-3 has q/k norms (drafter.style: qwen3 or gemma4), the whole vocabulary and no norm before "
            "the residual; write the portable form"
        )
    return write_sizes(config, *_architecture(_DEEPSPEC_EAGLES, config)) | {
        "target_layer_ids": list(config.feature_layers),
        "ttt_length": config.block_size,
        "step_loss_decay": 0.8,  # DeepSpec's class asks for it and uses it in training alone
        "draft_num_hidden_layers": 1,
    }


def tensors_to_form(tensors: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Our names to the form's: DeepSpec calls EAGLE-3's layer `layers.0`, all others `midlayer`; z-lab's DFlash has
    neither embedding nor head."""
    if architecture in _DEEPSPEC_EAGLES:
        return {name.replace("midlayer.", "layers.0.", 1): value for name, value in tensors.items()}
    if architecture == _DFLASH:
        return {name: value for name, value in tensors.items() if name not in ("embed_tokens.weight", "lm_head.weight")}
    return tensors


def tensors_from_form(tensors: dict[str, Tensor], config: DrafterShape) -> dict[str, Tensor]:
    """The form's names to ours."""
    if isinstance(config, EagleConfig):
        return {name.replace("layers.0.", "midlayer.", 1): value for name, value in tensors.items()}
    return tensors

"""The forms in which drafters circulate: what their `config.json` says, and how their tensors are called.

| architecture                                        | drafter                 | embedding, head   | layer ids            |
| Qwen3DSparkModel (DeepSpec)                         | DSpark, DFlash          | own, or borrowed  | target_layer_ids: i  |
| DFlashDraftModel (z-lab)                            | DFlash 1+N              | the target's      | target_layer_ids: i  |
| LlamaForCausalLMEagle3, Eagle3Qwen3ForCausalLM      | EAGLE-3, q/k norms in   | own head, embed-  | top level: i + 1,    |
|                                                     | the second              | ding may be lent  | eagle_config: i      |
| Qwen3Eagle3Model (DeepSpec)                         | EAGLE-3 with q/k norms  | own               | target_layer_ids: i  |

i is a layer OUTPUT index; i + 1 counts the embedding as 0, as Transformers' `hidden_states` does. vLLM and llama.cpp read
the top-level ids of EAGLE-3, SGLang the nested ones.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from draftkit.draft.drafter import DrafterConfig, DrafterShape
from draftkit.draft.eagle3 import EagleConfig
from draftkit.errors import CheckpointError

FORMS = ("portable", "deepspec")
_HEADS = {"vanilla": "markov", "gated": "gated", "rnn": "rnn"}
_DSPARK, _DFLASH, _DEEPSPEC_EAGLE = "Qwen3DSparkModel", "DFlashDraftModel", "Qwen3Eagle3Model"
_LLAMA_EAGLE, _QWEN_EAGLE = "LlamaForCausalLMEagle3", "Eagle3Qwen3ForCausalLM"
T = TypeVar("T", int, float, bool, str)


class Fields:
    """A `config.json` or a section of it, read field by field; CheckpointError names the file and the field."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}: is a {type(raw).__name__}, must be a mapping")
        self.raw, self.where = raw, where

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
            raise CheckpointError(f"{self.where}: field '{name}' is {value!r}, must be of type {kind.__name__}")
        return value

    def ids(self, name: str) -> tuple[int, ...] | None:
        """A list of integers, None when it is missing."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise CheckpointError(f"{self.where}: field '{name}' is {value!r}, must be a list of integers")
        return tuple(value)

    def section(self, name: str) -> Fields:
        """A nested mapping, empty when it is missing."""
        return Fields(self.raw.get(name) or {}, f"{self.where}: {name}")

    def demand(self, name: str, *allowed: object) -> None:
        """Raise CheckpointError unless the field is missing or has one of the values that are implemented."""
        value = self.raw.get(name)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{self.where}: field '{name}' is {value!r}; draftkit runs {' or '.join(map(repr, allowed))}")


def read_shape(fields: Fields, num_target_layers: int | None) -> DrafterShape:
    """A drafter's shape from any known form; `num_target_layers` helps where the form does not say it.

    Raises CheckpointError that names the architecture or the field that is missing, wrong or not implemented.
    """
    names = fields.raw.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else "nothing"
    if fields.raw.get("speculators_model_type"):
        raise CheckpointError(f"{fields.where}: the speculators form is not known; known are {', '.join(_READERS)}")
    if architecture not in _READERS:
        raise CheckpointError(f"{fields.where}: architecture {architecture} is not known; known are {', '.join(_READERS)}")
    return _READERS[architecture](fields, num_target_layers)


def _read_sizes(fields: Fields, num_target_layers: int | None) -> dict[str, Any]:
    fields.demand("hidden_act", "silu")
    fields.demand("attention_bias", False)
    fields.demand("mlp_bias", False)
    fields.demand("rope_scaling")
    rope = fields.section("rope_parameters")
    rope.demand("rope_type", "default")
    if any(kind != "full_attention" for kind in fields.raw.get("layer_types") or []):
        raise CheckpointError(f"{fields.where}: field 'layer_types': draftkit runs full_attention layers only")
    if num_target_layers is None and fields.raw.get("num_target_layers") is None:
        raise CheckpointError(f"{fields.where}: does not say 'num_target_layers'; load it together with its target")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    return {
        "hidden_size": hidden,
        "intermediate_size": fields.get("intermediate_size", int),
        "num_layers": fields.get("num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", int, heads),
        "head_dim": fields.get("head_dim", int, hidden // heads),
        "vocab_size": fields.get("vocab_size", int),
        "num_target_layers": fields.get("num_target_layers", int, num_target_layers),
        "rms_eps": fields.get("rms_norm_eps", float),
        "rope_theta": fields.get("rope_theta", float, rope.get("rope_theta", float, 10_000.0)),
        "max_length": fields.get("max_position_embeddings", int),
    }


def _wanted_ids(fields: Fields, name: str) -> tuple[int, ...]:
    found = fields.ids(name)
    if not found:
        raise CheckpointError(f"{fields.where}: field '{name}' is missing")
    return found


def _read_dspark(fields: Fields, num_target_layers: int | None) -> DrafterConfig:
    rank = fields.get("markov_rank", int, 0)
    kind = fields.get("markov_head_type", str, "vanilla")
    if kind not in _HEADS:
        raise CheckpointError(f"{fields.where}: markov_head_type {kind!r} is not known; known are {', '.join(_HEADS)}")
    return DrafterConfig(
        **_read_sizes(fields, num_target_layers),
        feature_layers=_wanted_ids(fields, "target_layer_ids"),
        mask_token_id=fields.get("mask_token_id", int),
        block_size=fields.get("block_size", int),
        layout="anchor" if fields.get("sample_from_anchor", bool, True) else "one_plus_n",
        head=_HEADS[kind] if rank else "none",
        markov_rank=rank,
        confidence=fields.get("enable_confidence_head", bool, False),
        confidence_with_markov=fields.get("confidence_head_with_markov", bool, True) and rank > 0,
    )


def _read_dflash(fields: Fields, num_target_layers: int | None) -> DrafterConfig:
    nested = fields.section("dflash_config")
    nested.demand("causal", False)
    for name in ("use_swa", "final_logit_softcapping", "output_multiplier", "input_embedding_scale"):
        nested.demand(name, False)
    return DrafterConfig(
        **_read_sizes(fields, num_target_layers),
        feature_layers=nested.ids("target_layer_ids") or _wanted_ids(fields, "target_layer_ids"),
        mask_token_id=nested.get("mask_token_id", int, fields.raw.get("mask_token_id")),
        block_size=nested.get("block_size", int, fields.raw.get("block_size")),
        layout="one_plus_n",
        head="none",
        markov_rank=0,
        confidence=False,
        confidence_with_markov=False,
    )


def _read_eagle(fields: Fields, num_target_layers: int | None) -> EagleConfig:
    for name in ("norm_before_fc", "fc_norm", "norm_output"):
        fields.demand(name, False)
    sizes = _read_sizes(fields, num_target_layers)
    fields.demand("target_hidden_size", sizes["hidden_size"])
    whole = sizes["vocab_size"]
    reduced = fields.get("draft_vocab_size", int, whole)
    return EagleConfig(
        **sizes,
        feature_layers=_eagle_layers(fields, sizes["num_target_layers"]),
        block_size=fields.get("ttt_length", int, DrafterShape.block_size),
        draft_vocab_size=reduced if reduced != whole else None,
        qk_norm=fields.raw["architectures"][0] in (_QWEN_EAGLE, _DEEPSPEC_EAGLE),
        norm_before_residual=fields.get("norm_before_residual", bool, False),
    )


def _eagle_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """OUTPUT indices, from whichever place names the layers; EAGLE-3's default counts hidden states."""
    if fields.raw["architectures"][0] == _DEEPSPEC_EAGLE:
        return _wanted_ids(fields, "target_layer_ids")
    if (counted := fields.ids("eagle_aux_hidden_state_layer_ids")) is not None:
        return tuple(i - 1 for i in counted)
    if (nested := fields.section("eagle_config").ids("eagle_aux_hidden_state_layer_ids")) is not None:
        return nested
    return (1, layers // 2 - 1, layers - 4)


_READERS = {
    _DSPARK: _read_dspark,
    "DSparkDraftModel": _read_dspark,
    _DFLASH: _read_dflash,
    _LLAMA_EAGLE: _read_eagle,
    "Eagle3LlamaForCausalLM": _read_eagle,
    _QWEN_EAGLE: _read_eagle,
    _DEEPSPEC_EAGLE: _read_eagle,
}


def write_shape(config: DrafterShape, form: str) -> dict[str, Any]:
    """`config.json` in a form of FORMS. Raises CheckpointError when the form cannot hold this drafter."""
    if form not in FORMS:
        raise CheckpointError(f"form {form!r} is not known; choose one of {', '.join(FORMS)}")
    if isinstance(config, EagleConfig):
        return _write_eagle(config) if form == "portable" else _write_deepspec_eagle(config)
    if not isinstance(config, DrafterConfig):
        raise TypeError(f"{type(config).__name__}: has no form")
    if config.layout == "one_plus_n" and config.algorithm == "dflash":
        if form == "deepspec":
            raise CheckpointError("DeepSpec has no 1+N layout; its DFlash drafts from the anchor on (drafter.layout: anchor)")
        return _write_dflash(config)
    return _write_dspark(config)


def _write_sizes(config: DrafterShape, architecture: str, model_type: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_length,
        "layer_types": ["full_attention"] * config.num_layers,
        "tie_word_embeddings": False,
        "num_target_layers": config.num_target_layers,
    }


def _write_dspark(config: DrafterConfig) -> dict[str, Any]:
    names = {v: k for k, v in _HEADS.items()}
    return _write_sizes(config, _DSPARK, "qwen3") | {
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


def _write_dflash(config: DrafterConfig) -> dict[str, Any]:
    ids = {"mask_token_id": config.mask_token_id, "target_layer_ids": list(config.feature_layers)}
    return _write_sizes(config, _DFLASH, "qwen3") | {"block_size": config.block_size, "dflash_config": ids}


def _write_eagle(config: EagleConfig) -> dict[str, Any]:
    kind = (_QWEN_EAGLE, "qwen3") if config.qk_norm else (_LLAMA_EAGLE, "llama")
    layers = list(config.feature_layers)
    return _write_sizes(config, *kind) | {
        "draft_vocab_size": config.head_size,
        "norm_before_residual": config.norm_before_residual,
        "num_aux_hidden_states": len(layers),
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in layers],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers},
        "ttt_length": config.block_size,
    }


def _write_deepspec_eagle(config: EagleConfig) -> dict[str, Any]:
    if not config.qk_norm or config.draft_vocab_size or config.norm_before_residual:
        raise CheckpointError(
            "DeepSpec's EAGLE-3 has q/k norms (drafter.qk_norm: true), the whole vocabulary and no norm before the residual"
        )
    return _write_sizes(config, _DEEPSPEC_EAGLE, "qwen3") | {
        "target_layer_ids": list(config.feature_layers),
        "ttt_length": config.block_size,
        "step_loss_decay": 0.8,  # DeepSpec's class asks for it and uses it in training alone
        "draft_num_hidden_layers": 1,
    }


def tensors_to_form(tensors: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Our names to the form's: DeepSpec calls EAGLE-3's layer `layers.0`, all others `midlayer`; z-lab's DFlash has
    neither embedding nor head."""
    if architecture == _DEEPSPEC_EAGLE:
        return {name.replace("midlayer.", "layers.0.", 1): value for name, value in tensors.items()}
    if architecture == _DFLASH:
        return {name: value for name, value in tensors.items() if name not in ("embed_tokens.weight", "lm_head.weight")}
    return tensors


def tensors_from_form(tensors: dict[str, Tensor], config: DrafterShape) -> dict[str, Tensor]:
    """The form's names to ours."""
    if isinstance(config, EagleConfig):
        return {name.replace("layers.0.", "midlayer.", 1): value for name, value in tensors.items()}
    return tensors

"""The forms in which drafters circulate: what their `config.json` says, and how their tensors are called.

| architecture | drafter | embedding, head | layer ids |
|---|---|---|---|
| Qwen3DSparkModel, Gemma4DSparkModel (DeepSpec) | DSpark, DFlash | own, or borrowed | target_layer_ids: i |
| LlamaDSparkModel (ours, no engine knows it) | the same, Llama's block | as above | as above |
| DFlashDraftModel (z-lab; with more: dflash2_form.py, xpress.py) | DFlash 1 + N | the target's | as above |
| LlamaForCausalLMEagle3, Eagle3Qwen3ForCausalLM | EAGLE-3, the second with q/k norms | own, or borrowed; a
  reduced head is its own | top level: i + 1, eagle_config: i |
| Qwen3Eagle3Model, Gemma4Eagle3Model (DeepSpec) | EAGLE-3 | own, or borrowed | target_layer_ids: i |

i is a layer OUTPUT index; i + 1 counts the embedding as 0, as Transformers' `hidden_states` does. vLLM and
llama.cpp read the top-level ids of EAGLE-3, SGLang the nested ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from draftkit.draft import deepseek_v4_checkpoint as deepseek_v4
from draftkit.draft.checkpoint_fields import (
    Fields,
    demand_full_attention,
    read_dflash,
    read_layer_attention,
    read_sizes,
    write_sizes,
)
from draftkit.draft.drafter import DrafterConfig, DrafterShape
from draftkit.draft.eagle3_shape import NORMS, EagleConfig
from draftkit.errors import CheckpointError
from draftkit.target.deepseek_v4 import is_draft

FORMS = ("portable", "deepspec")
_HEADS = {"vanilla": "markov", "gated": "gated", "rnn": "rnn"}
_MODEL_TYPES = {"qwen3": "qwen3", "gemma4": "gemma4_text", "llama": "llama"}
# what no form here reads, and why
NOT_RUN = {
    "LiLiCorrDraftModel": "LiLiCorr walks through a block's candidates by scores of its own",
    "DominoDraftModel": "Domino corrects a block's logits with a recurrent cell",
    "PEagleDraftModel": "P-EAGLE drafts all tokens at once from a learned state",
}
NOT_RUN |= dict.fromkeys(("PeagleLlamaForCausalLM", "PeagleQwen3ForCausalLM"), NOT_RUN["PEagleDraftModel"])
OTHER_NAMES = {"Eagle3LlamaForCausalLM": "LlamaForCausalLMEagle3", "DSparkDraftModel": "Qwen3DSparkModel"}


@dataclass(frozen=True)
class Form:
    """One way in which drafters of one kind are written.

    Attributes:
        names: under which of FORMS a person asks for it. styles: the architectures that `config.json` may
        name, and the block style of each. read: the drafter's shape from the fields and the sizes that all
        forms share. write: the fields of `config.json`. refuses: why a shape does not fit this form under one
        of its names; None: it fits. renamed: beginnings of tensor names, the form's to ours; in reading those
        of other forms are known, too. with_target_weights: embedding and head are in the folder, unless they
        are left out on purpose. sizes: the fields that all forms share, from this form's file. to_names,
        from_names: what `renamed` cannot say, from tensors and shape. holds: which tensors of the folder are
        the drafter's, by name."""

    names: tuple[str, ...]
    styles: dict[str, str]
    read: Callable[[Fields, dict[str, Any]], DrafterShape]
    write: Callable[[Any], dict[str, Any]]
    refuses: Callable[[Any, str], str | None] = lambda config, name: None
    renamed: Mapping[str, str] = field(default_factory=dict)
    with_target_weights: bool = True
    sizes: Callable[[Fields, str, int | None], dict[str, Any]] = read_sizes
    to_names: Callable[[Any, Any], dict[str, Tensor]] | None = None
    from_names: Callable[[Any, Any], dict[str, Tensor]] | None = None
    holds: Callable[[str], bool] = lambda name: True


def _read_dspark(fields: Fields, sizes: dict[str, Any]) -> DrafterConfig:
    nested = fields.section("dflash_config")  # SpecForge puts what is DSpark's own there
    nested.demand("projector_type", "dspark")
    nested.demand("shift_label", True)
    fields = Fields({**fields.raw, **nested.raw}, fields.where)
    rank = fields.get("markov_rank", int, 0)
    kind = fields.get("markov_head_type", str, "vanilla")
    if kind not in _HEADS:
        raise CheckpointError(
            f"{fields.where}: markov_head_type {kind!r} is not known; known are {', '.join(_HEADS)}"
        )
    reduced = fields.get("draft_vocab_size", int, sizes["vocab_size"])
    return DrafterConfig(
        **sizes,
        draft_vocab_size=reduced if reduced != sizes["vocab_size"] else None,
        feature_layers=fields.wanted_ids("target_layer_ids"),
        mask_token_id=fields.get("mask_token_id", int),
        block_size=fields.get("block_size", int),
        layout="anchor" if fields.get("sample_from_anchor", bool, True) else "one_plus_n",
        head=_HEADS[kind] if rank else "none",
        markov_rank=rank,
        confidence=fields.get("enable_confidence_head", bool, False),
        confidence_with_markov=fields.get("confidence_head_with_markov", bool, True) and rank > 0,
        window=fields.optional("context_window", int),
        layer_attention=read_layer_attention(fields, nested),
    )


def _read_dflash(fields: Fields, sizes: dict[str, Any]) -> DrafterConfig:
    nested = fields.section("dflash_config")
    nested.demand("projector_type", "dflash")
    for name in ("output_multiplier", "input_embedding_scale"):
        nested.demand(name, 1.0)
    sizes["soft_cap"] = nested.optional("final_logit_softcapping", float)
    reduced = fields.get("draft_vocab_size", int, sizes["vocab_size"])
    return DrafterConfig(
        **sizes,
        draft_vocab_size=reduced if reduced != sizes["vocab_size"] else None,
        **read_dflash(fields, nested),
        window=fields.optional("context_window", int),
    )


def _read_eagle(fields: Fields, sizes: dict[str, Any]) -> EagleConfig:
    demand_full_attention(fields)
    fields.demand("parallel_drafting", False)
    fields.demand("target_hidden_size", sizes["hidden_size"])
    nested = fields.section("eagle_config")
    whole = sizes["vocab_size"]
    reduced = fields.get("draft_vocab_size", int, whole)
    return EagleConfig(
        **sizes,
        feature_layers=_eagle_layers(fields, sizes["num_target_layers"]),
        block_size=fields.get("ttt_length", int, DrafterShape.block_size),
        draft_vocab_size=reduced if reduced != whole else None,
        norm_before_residual=fields.get("norm_before_residual", bool, False),
        norm_before_fc=nested.get("norm_before_fc", bool, fields.get("norm_before_fc", bool, False)),
        fc_norm=fields.get("fc_norm", bool, False),
        norm_output=fields.get("norm_output", bool, False),
    )


def _eagle_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """OUTPUT indices, from whichever place names the layers; EAGLE-3's default counts hidden states."""
    if (counted := fields.ids("eagle_aux_hidden_state_layer_ids")) is not None:
        return tuple(i - 1 for i in counted)
    if (nested := fields.section("eagle_config").ids("eagle_aux_hidden_state_layer_ids")) is not None:
        return nested
    return (1, layers // 2 - 1, layers - 4)


def _read_deepspec_eagle(fields: Fields, sizes: dict[str, Any]) -> EagleConfig:
    demand_full_attention(fields)
    return EagleConfig(
        **sizes,
        feature_layers=fields.wanted_ids("target_layer_ids"),
        block_size=fields.get("ttt_length", int),
    )


def _architecture(form: Form, config: DrafterShape) -> tuple[str, str]:
    """The architecture of a style, and Transformers' name of its model type."""
    return next(name for name, style in form.styles.items() if style == config.style), _MODEL_TYPES[
        config.style
    ]


def _write_dspark(config: DrafterConfig) -> dict[str, Any]:
    names = {v: k for k, v in _HEADS.items()}
    fields = write_sizes(config, *_architecture(DSPARK, config)) | {
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
    if config.draft_vocab_size:
        fields["draft_vocab_size"] = config.draft_vocab_size
    return fields | _window(config)


def _write_dflash(config: DrafterConfig) -> dict[str, Any]:
    nested: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.feature_layers),
    }
    fields = write_sizes(config, *_architecture(DFLASH, config))
    fields |= {"block_size": config.block_size, "dflash_config": nested}
    if "final_logit_softcapping" in fields:
        nested["final_logit_softcapping"] = fields.pop("final_logit_softcapping")
    return fields | _window(config)


def _window(config: DrafterConfig) -> dict[str, Any]:
    """A field of ours: an engine that does not know it lets the drafter see the whole context, which loses
    nothing."""
    return {"context_window": config.window} if config.window else {}


def _write_eagle(config: EagleConfig) -> dict[str, Any]:
    layers = list(config.feature_layers)
    return write_sizes(config, *_architecture(EAGLE, config)) | {
        "draft_vocab_size": config.head_size,
        "norm_before_residual": config.norm_before_residual,
        **{name: True for name in NORMS if getattr(config, name)},
        "num_aux_hidden_states": len(layers),
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in layers],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers},
        "ttt_length": config.block_size,
    }


def _write_deepspec_eagle(config: EagleConfig) -> dict[str, Any]:
    return write_sizes(config, *_architecture(DEEPSPEC_EAGLE, config)) | {
        "target_layer_ids": list(config.feature_layers),
        "ttt_length": config.block_size,
        "step_loss_decay": 0.8,  # DeepSpec's class asks for it and uses it in training alone
        "draft_num_hidden_layers": 1,
    }


def _not_dspark(config: DrafterConfig, name: str) -> str | None:
    if name == "deepspec" and (config.layout != "anchor" or config.style == "llama"):
        return "DeepSpec has the anchor layout alone, and no Llama block; write the portable form"
    if name == "deepspec" and config.draft_vocab_size:
        return (
            "DeepSpec drafts from the whole vocabulary; write the portable form, which vLLM and "
            "llama.cpp load"
        )
    return None


def _not_dflash(config: DrafterConfig, name: str) -> str | None:
    fits = config.layout == "one_plus_n" and config.style == "qwen3" and not config.draft_vocab_size
    return (
        None if fits else "z-lab's DFlash has the layout one_plus_n, the Qwen3 block and the whole vocabulary"
    )


def _not_eagle(config: EagleConfig, name: str) -> str | None:
    return (
        None if config.style in EAGLE.styles.values() else f"no engine's EAGLE-3 has the block {config.style}"
    )


def _not_deepspec_eagle(config: EagleConfig, name: str) -> str | None:
    fits = config.style in DEEPSPEC_EAGLE.styles.values()
    normed = config.norm_before_residual or any(getattr(config, name) for name in NORMS)
    if fits and not config.draft_vocab_size and not normed:
        return None
    return (
        "DeepSpec's EAGLE-3 has q/k norms (drafter.style: qwen3 or gemma4), the whole vocabulary and no "
        "norm before the "
        "residual; write the portable form"
    )


_BLOCKS = {"Qwen3DSparkModel": "qwen3", "Gemma4DSparkModel": "gemma4", "LlamaDSparkModel": "llama"}
_EAGLES = {"LlamaForCausalLMEagle3": "llama", "Eagle3Qwen3ForCausalLM": "qwen3"}
_DEEPSPEC_EAGLES = {"Qwen3Eagle3Model": "qwen3", "Gemma4Eagle3Model": "gemma4"}
_LAYER = {"layers.0.": "midlayer."}
DSPARK = Form(FORMS, _BLOCKS, _read_dspark, _write_dspark, _not_dspark)
DFLASH = Form(
    ("portable",),
    {"DFlashDraftModel": "qwen3"},
    _read_dflash,
    _write_dflash,
    _not_dflash,
    with_target_weights=False,
)
EAGLE = Form(("portable",), _EAGLES, _read_eagle, _write_eagle, _not_eagle)
DEEPSPEC_EAGLE = Form(
    FORMS, _DEEPSPEC_EAGLES, _read_deepspec_eagle, _write_deepspec_eagle, _not_deepspec_eagle, _LAYER
)
DEEPSEEK_V4 = Form(
    ("portable",),
    deepseek_v4.STYLES,
    deepseek_v4.read_shape,
    deepseek_v4.write_fields,
    with_target_weights=False,
    sizes=deepseek_v4.read_sizes,
    to_names=deepseek_v4.to_checkpoint,
    from_names=deepseek_v4.from_checkpoint,
    holds=is_draft,
)

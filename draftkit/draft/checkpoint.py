"""Drafter checkpoints: a Hugging Face folder in the portable layout that vLLM, SGLang and llama.cpp load unchanged.

Flat `config.json` with architecture `Qwen3DSparkModel`, tensor names without a prefix, embedding and head included,
feature layers as `target_layer_ids` (layer OUTPUT indices). Format: DeepSpec's published checkpoints. Beside it
`draftkit.json` records provenance. safetensors only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftkit import __version__
from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import Drafter, DrafterConfig, DrafterShape
from draftkit.errors import CheckpointError

WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "draftkit.json"
_HEAD_NAMES = {"vanilla": "markov", "gated": "gated", "rnn": "rnn"}


def new_drafter(config: DrafterConfig, embedding_VH: Tensor, head_VH: Tensor) -> Drafter:
    """A fresh drafter with frozen copies of the target's embedding and head."""
    drafter = BlockDrafter(config)
    for parameter, source in ((drafter.embed_tokens.weight, embedding_VH), (drafter.lm_head.weight, head_VH)):
        if parameter.shape != source.shape:
            raise CheckpointError(
                f"target embedding {tuple(source.shape)} does not fit a drafter of {tuple(parameter.shape)}"
            )
        parameter.data.copy_(source)
    return drafter


def save_drafter(drafter: Drafter, folder: Path, provenance: dict[str, Any], dtype: torch.dtype) -> None:
    """Write the folder; weights are replaced in one rename, last, so that a broken write is never taken for a drafter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(_to_hf(drafter.config, dtype), indent=1) + "\n", encoding="utf-8")
    tensors = {k: v.detach().to("cpu", dtype).clone().contiguous() for k, v in drafter.state_dict().items()}
    partial = folder / (WEIGHTS + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    note = {"draftkit": __version__, "algorithm": drafter.config.algorithm, "sha256": digest} | provenance
    (folder / PROVENANCE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / WEIGHTS)


def load_drafter(folder: Path, dtype: torch.dtype = torch.float32) -> Drafter:
    """Read a folder. Raises CheckpointError naming the file, the field or the tensor that is wrong."""
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.exists():
        raise CheckpointError(f"{folder}: has no {WEIGHTS}; give the folder that `draftkit train` wrote")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); train or copy it again") from error
    drafter = BlockDrafter(config)
    check_tensors(str(path), {k: v.shape for k, v in drafter.state_dict().items()}, tensors)
    drafter.load_state_dict(tensors)
    return drafter.to(dtype).eval()


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `draftkit.json` says, or an empty dict for a drafter that draftkit did not train."""
    path = folder / PROVENANCE
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def check_tensors(where: str, wanted: dict[str, torch.Size], found: dict[str, Tensor]) -> None:
    """Raise CheckpointError that names the missing, unknown or wrongly shaped tensors."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        parts = [f"{what} {', '.join(names[:4])}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        raise CheckpointError(f"{where}: tensors do not fit the configuration: {'; '.join(parts)}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{where}: {name} is {tuple(found[name].shape)}, the configuration says {tuple(shape)}")


def read_config(folder: Path) -> DrafterConfig:
    """The drafter's shape from `config.json`. Raises CheckpointError when it is missing, broken or of another kind."""
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(f"{folder}: has no {CONFIG}; give the folder of a drafter")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    architecture = (raw.get("architectures") or ["nothing"])[0]
    if architecture not in ("Qwen3DSparkModel", "DSparkDraftModel"):
        raise CheckpointError(f"{path}: architecture {architecture} is not known; Qwen3DSparkModel is")
    try:
        rank = raw.get("markov_rank", 0)
        return DrafterConfig(
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=raw["head_dim"],
            vocab_size=raw["vocab_size"],
            feature_layers=tuple(raw["target_layer_ids"]),
            num_target_layers=raw["num_target_layers"],
            mask_token_id=raw["mask_token_id"],
            block_size=raw["block_size"],
            head=_HEAD_NAMES[raw.get("markov_head_type", "vanilla")] if rank else "none",
            markov_rank=rank,
            confidence=raw.get("enable_confidence_head", False),
            confidence_with_markov=raw.get("confidence_head_with_markov", True) and rank > 0,
            rms_eps=raw["rms_norm_eps"],
            rope_theta=raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"],
            max_length=raw["max_position_embeddings"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: field {error} is missing or not known") from error


def _to_hf(config: DrafterShape, dtype: torch.dtype) -> dict[str, Any]:
    if not isinstance(config, DrafterConfig):
        raise TypeError(f"{type(config).__name__}: has no portable form yet")
    names = {v: k for k, v in _HEAD_NAMES.items()}
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "dtype": str(dtype).removeprefix("torch."),
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
        "block_size": config.block_size,
        "target_layer_ids": list(config.feature_layers),
        "num_target_layers": config.num_target_layers,
        "mask_token_id": config.mask_token_id,
        "markov_rank": config.markov_rank if config.head != "none" else 0,
        "markov_head_type": names.get(config.head, "vanilla"),
        "enable_confidence_head": config.confidence,
        "confidence_head_with_markov": config.confidence_with_markov and config.head != "none",
    }

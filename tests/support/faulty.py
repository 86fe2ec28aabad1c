"""Folders of drafters with something wrong in them, as it happens: one function per fault, on a copy of the
packaged drafter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftkit.artefact import DIGEST, sealed
from draftkit.target.interface import TargetWeights
from draftkit.target.place import EMBEDDED

Fields, Tensors = dict[str, Any], dict[str, Tensor]
Fault = Callable[[Fields, Tensors, Fields], None]  # changes config.json, weights and provenance in place


def faulty(folder: Path, *faults: Fault) -> Path:
    """The packaged drafter with these faults, as a folder that vouches for nothing."""
    shutil.copytree(EMBEDDED / "drafter", folder)
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    note = json.loads((folder / "draftkit.json").read_text("utf-8"))
    tensors = load_file(folder / "model.safetensors")
    note = {k: v for k, v in note.items() if k not in ("sha256", "config_sha256", DIGEST)}
    for fault in faults:
        fault(raw, tensors, note)
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    (folder / "draftkit.json").write_text(json.dumps(sealed(note)), "utf-8")
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def fields(**changes: Any) -> Fault:
    """Set fields of config.json; None removes one."""

    def change(raw: Fields, tensors: Tensors, note: Fields) -> None:
        for name, value in changes.items():
            raw.pop(name, None)
            if value is not None:
                raw[name] = value

    return change


def noted(**changes: Any) -> Fault:
    """Set fields of the provenance."""

    def change(raw: Fields, tensors: Tensors, note: Fields) -> None:
        note |= changes

    return change


def without(start: str) -> Fault:
    """Leave out the tensors whose names begin so."""

    def change(raw: Fields, tensors: Tensors, note: Fields) -> None:
        for name in [n for n in tensors if n.startswith(start)]:
            del tensors[name]

    return change


def prefixed(raw: Fields, tensors: Tensors, note: Fields) -> None:
    for name in list(tensors):
        tensors["model." + name] = tensors.pop(name)


def opposite_order(raw: Fields, tensors: Tensors, note: Fields) -> None:
    tensors["fc.weight"] = torch.cat(tensors["fc.weight"].chunk(2, 1)[::-1], 1)


def with_copies(target: TargetWeights, embedding: float = 1.0, head: float = 1.0) -> Fault:
    """Embedding and head of the target in the folder, times these factors."""

    def change(raw: Fields, tensors: Tensors, note: Fields) -> None:
        tensors["embed_tokens.weight"] = target.embedding_weight().clone() * embedding
        tensors["lm_head.weight"] = target.head_weight().clone() * head

    return change


def another_head(raw: Fields, tensors: Tensors, note: Fields) -> None:
    """Rows in another order, as of another tokenizer."""
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)


def reduced(target: TargetWeights, absolute: bool = False, lost: bool = False) -> Fault:
    """Half of the vocabulary can be drafted."""

    def change(raw: Fields, tensors: Tensors, note: Fields) -> None:
        ids = torch.arange(0, target.info.vocab_size, 2)
        raw["draft_vocab_size"] = len(ids)
        tensors["lm_head.weight"] = target.head_weight()[ids].clone()
        tensors["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"][ids]
        if not lost:
            tensors["d2t"] = ids if absolute else ids - torch.arange(len(ids))

    return change


def untrained(raw: Fields, tensors: Tensors, note: Fields) -> None:
    """Random weights where there was training."""
    torch.manual_seed(0)
    for name, t in tensors.items():
        if t.ndim == 2:
            tensors[name] = torch.randn_like(t) * 0.02


# the folder's note says nothing of the training: only running can tell
UNKNOWN = noted(recipe={})
FAULTS: dict[str, tuple[Fault, ...]] = {
    "layer ids": (fields(target_layer_ids=[6, 11]),),
    "block size": (fields(block_size=5),),
    "block layout": (fields(sample_from_anchor=False),),
    "mask token": (UNKNOWN, fields(mask_token_id=17)),
    "Markov head": (without("markov_head."),),
    "confidence head": (without("confidence_head."),),
    "confidence defaults": (fields(confidence_head_with_markov=None),),
    "tensor names": (prefixed,),
    "vocab size": (fields(vocab_size=4100),),
    "hidden size": (fields(hidden_size=128),),
    "context range": (fields(max_position_embeddings=512),),
    "context window": (UNKNOWN, fields(context_window=1)),
    "quantised drafter": (fields(quantization_config={"quant_method": "gptq"}),),
    "proposals": (untrained,),
    "target": (noted(target_fingerprint="0" * 64, target="another"),),
    "chat template": (noted(template_hash="0" * 64),),
    "template switches": (noted(template_switches={"enable_thinking": False}),),
    "card": (noted(validation={"code": 5.5, "math": 6.5, "loss": 1.0}),),
}
TOGETHER = [
    ("mask token", "confidence defaults", "chat template"),
    ("layer ids", "tensor names", "template switches"),
]

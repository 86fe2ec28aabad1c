"""Drafters of every form, and folders of them that tests change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.drafter import DrafterShape
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.target.transformers import TransformersTarget
from support.drafters import BLOCK_CONFIG as BLOCK
from support.drafters import EAGLE_CONFIG as EAGLE
from support.drafters import GEMMA

DFLASH: dict[str, Any] = {
    "head": "none",
    "markov_rank": 0,
    "confidence": False,
    "confidence_with_markov": False,
}
SHAPES: dict[str, DrafterShape] = {
    "dspark": BLOCK,
    "gated": replace(BLOCK, head="gated", confidence_with_markov=False),
    "dspark 1+N": replace(BLOCK, head="rnn", layout="one_plus_n"),
    "dflash": replace(BLOCK, **DFLASH),
    "dflash 1+N": replace(BLOCK, **DFLASH, layout="one_plus_n"),
    "dflash 1+N capped": replace(BLOCK, **DFLASH, layout="one_plus_n", soft_cap=30.0, window=9),
    "dspark reduced": replace(BLOCK, draft_vocab_size=12),
    "gemma4": replace(BLOCK, **GEMMA),
    "llama": replace(BLOCK, style="llama", window=12, logit_scale=0.5),
    "eagle3": EAGLE,
    "eagle3 gemma4": replace(EAGLE, **GEMMA),
    "eagle3 with norms": replace(EAGLE, style="qwen3", block_size=5),
    "eagle3 reduced": replace(EAGLE, draft_vocab_size=12, norm_before_residual=True),
}


def drafter_for(target: TransformersTarget, shape: DrafterShape) -> BlockDrafter | EagleDrafter:
    torch.manual_seed(2)
    shape = replace(shape, hidden_size=32, vocab_size=target.info.vocab_size, num_target_layers=4)
    size = getattr(shape, "draft_vocab_size", None)
    ids = torch.arange(1, 3 * size, 3) if size else None
    drafter = new_drafter(shape, target.embedding_weight(), target.head_weight(), ids)
    for parameter in drafter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return drafter.eval()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit(folder: Path, **changes: Any) -> dict[str, Any]:
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {k: v for k, v in fields.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "draftkit.json").unlink(missing_ok=True)  # which would find it
    return fields

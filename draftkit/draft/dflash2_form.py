"""The form of z-lab's DFlash2: DFlash's, with its convolutions and its selector in `dflash_config`."""

from __future__ import annotations

from typing import Any

from draftkit.draft.checkpoint_fields import Fields, read_dflash
from draftkit.draft.checkpoint_forms import Form
from draftkit.draft.dflash2 import Dflash2Config
from draftkit.errors import CheckpointError


def _read_dflash2(fields: Fields, sizes: dict[str, Any]) -> Dflash2Config:
    nested = fields.section("dflash_config")
    fields.demand("draft_vocab_size", sizes["vocab_size"])
    cap = nested.optional("final_logit_softcapping", float) or None
    factor = nested.get("output_multiplier", float, 1.0)
    if cap is not None and factor != 1:
        raise CheckpointError(
            f"{fields.where}: has both output_multiplier and final_logit_softcapping, whose order engines "
            "disagree on; draftkit runs one of them"
        )
    return Dflash2Config(
        **sizes | {"soft_cap": cap, "logit_scale": factor},
        **read_dflash(fields, nested),
        conv_kernel_size=nested.get("conv_kernel_size", int),
        conv_group_size=nested.get("conv_group_size", int),
        selector_rank=nested.get("selector_rank", int),
        selector_top_k=nested.get("selector_top_k", int),
        input_embedding_scale=nested.get("input_embedding_scale", float, 1.0),
    )


DFLASH2 = Form(
    (),
    {"DFlash2DraftModel": "qwen3"},
    _read_dflash2,
    lambda config: {},  # under no name: it is read alone
    with_target_weights=False,
)

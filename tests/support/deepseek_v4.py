"""DeepSeek-V4 at the size of a test: targets, draft modules, and a folder that every stage takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import DeepseekV4Config

from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.checkpoint_fields import Fields
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter, block_config
from draftkit.draft.deepseek_v4_checkpoint import read_shape, read_sizes
from draftkit.draft.deepseek_v4_shape import DeepseekV4Shape
from draftkit.target.interface import TargetInfo
from draftkit.target.transformers import TransformersTarget
from support.targets import TEXTS
from tools.tiny_v4 import tiny_model, v4_tokenizer, write_checkpoint
from tools.v4_configs import TINY


def tiny_target(heavy: int = 128, seed: int = 0) -> TransformersTarget:
    """The random model as a target in float32; it never ends an answer."""
    model = tiny_model(heavy, seed)
    return TransformersTarget(model, TargetInfo("tiny-v4", None, "f", 96, 64, 5, (), 512, "deepseek_v4"))


def tiny_shape(**changes: Any) -> DeepseekV4Shape:
    """The shape of the tiny target's draft module."""
    fields = Fields(TINY, "tiny")
    shape = read_shape(fields, read_sizes(fields, "deepseek_v4", None))
    return replace(shape, **changes)


def tiny_config() -> DeepseekV4Config:
    """What the module's blocks are made from."""
    return block_config(tiny_shape())


def tiny_drafter(target: TransformersTarget, spread: float = 0.15, **changes: Any) -> DeepseekV4Drafter:
    """A random draft module whose proposals differ from place to place."""
    torch.manual_seed(1)
    drafter = new_drafter(tiny_shape(**changes), target.embedding_weight(), target.head_weight())
    assert isinstance(drafter, DeepseekV4Drafter)
    for name, parameter in drafter.named_parameters():
        if parameter.requires_grad and (parameter.ndim > 1 or name.endswith("sinks")):
            torch.nn.init.normal_(parameter, std=spread)
    return drafter.eval()


def whole_tokenizer() -> Any:
    """The tiny tokenizer with the tokens of all tasks."""
    tokenizer = v4_tokenizer(TEXTS)
    more = [AddedToken(f"<｜{task}｜>", special=True, normalized=False) for task in ("authority", "domain")]
    tokenizer.add_tokens(more)
    return tokenizer


def tiny_folder(folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    """A random tiny V4 with tokenizer and a random draft module, as DeepSeek writes them."""
    tokenizer = tokenizer or v4_tokenizer(TEXTS)
    raw = TINY | {
        "vocab_size": len(tokenizer) + 1,
        "dspark_noise_token_id": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **changes,
    }
    write_checkpoint(folder, tiny_model(**raw), raw)
    tokenizer.save_pretrained(folder)
    return folder


def user(text: str, **more: Any) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": text, **more}


def said(text: str, **more: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": text, **more}


def system(form: Any) -> dict[str, Any]:
    """A system message with a response_format."""
    return {"role": "system", "content": "S", "response_format": form}

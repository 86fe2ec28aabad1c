"""What a target's configuration says about what reading through it takes; weights are not needed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from draftkit.config import Recipe
from draftkit.errors import TargetError
from draftkit.target.deepseek_v4 import raw_config
from draftkit.target.deepseek_v4_tensors import FAMILY, checkpoint_tensors, draft_tensors, total_bytes
from draftkit.target.interface import TargetInfo
from draftkit.target.loading import UNREADABLE, checked_config, longest_context, resolve_target, said
from draftkit.target.transformers import DTYPES


@dataclass(frozen=True)
class TargetSizes:
    """What a target's configuration says; `active` parameters take part in one token's pass; `weight_bytes`
    as whoever reads through it holds them."""

    info: TargetInfo
    text_config: Any
    parameters: int
    active: int
    weight_bytes: int


def target_sizes(path: str, revision: str | None, dtype: str) -> TargetSizes:
    """What a target's configuration says; a folder that holds `config.json` alone will do. Raises TargetError
    when there is none, or of a family without a skeleton."""
    folder = Path(path)
    source = path if (folder / "config.json").is_file() else resolve_target(path)
    checked_config(path, source, revision)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except UNREADABLE as error:
        raise TargetError(f"{path}: its configuration cannot be read: {said(error)}") from error
    text, size = config.get_text_config(), DTYPES[dtype].itemsize
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and "shared" not in n)
    whole = sum(p.numel() for p in model.parameters())
    count = next((c for n in ("n_routed_experts", "num_local_experts", "num_experts")
                  if (c := getattr(text, n, None))), 0)  # fmt: skip
    chosen = getattr(text, "num_experts_per_tok", 0) or 0
    active = whole - experts + (experts * chosen // count if count else experts)
    info = TargetInfo(
        path, revision, "", int(text.vocab_size), int(text.hidden_size), int(text.num_hidden_layers), (),
        longest_context(text), str(text.model_type),
    )  # fmt: skip
    return TargetSizes(info, text, whole, active, _stored_bytes(source, revision, text) or size * whole)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of large matrix products on a device, the best of a few."""
    size = 4096 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        for _ in range(3):
            a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begun) / 3)
    return 2 * size**3 / best


def reading_bytes(recipe: Recipe, sizes: TargetSizes, layers: int, devices: int) -> int:
    """What capture holds on each device: weights, and of one batch's pass features, last hidden states and a
    layer's inner states. A V4 target is read as floats, its layers over all devices."""
    text, item = sizes.text_config, DTYPES[recipe.target.dtype].itemsize
    tokens = max(recipe.capture.batch_tokens, recipe.capture.max_length)
    if sizes.info.family == FAMILY:
        of_token = (layers + 1) * sizes.info.hidden_size + _v4_layer(text, recipe.capture.max_length)
        return item * (sizes.parameters // devices + tokens * of_token)
    inner = getattr(text, "intermediate_size", None) or 4 * sizes.info.hidden_size
    return sizes.weight_bytes + tokens * ((layers + 8) * sizes.info.hidden_size + 3 * int(inner)) * item


def _v4_layer(text: Any, length: int) -> int:
    """Numbers that Transformers' attention, which has one way for V4, holds of a token in texts of this
    length: streams before and after, queries as they are, rotated and mixed, keys and values of each head,
    and scores as they come, with the sink and in their softmax."""
    rates = [rate for kind, rate in text.compress_rates.items() if kind in text.layer_types]
    keys = length + length // min(rates) if rates else length
    heads, width = text.num_attention_heads, text.num_attention_heads * text.head_dim
    return 2 * text.hc_mult * text.hidden_size + 3 * width + 2 * width * keys // length + 3 * heads * keys


def _stored_bytes(source: str, revision: str | None, text: Any) -> int | None:
    """Of a quantised V4 checkpoint, which vLLM holds as it is stored, without its draft module; else None."""
    if text.model_type != FAMILY:
        return None
    raw = raw_config(source, revision)
    if not raw.get("quantization_config"):
        return None
    return total_bytes(checkpoint_tensors(raw)) - total_bytes(draft_tensors(raw))

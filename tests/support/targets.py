"""Small random targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from draftkit.target.interface import TargetInfo
from draftkit.target.transformers import TransformersTarget
from tools.tiny_target.tokenizer import train_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "What is a list? A list holds values.",
    "Step 1: 3 + 4 = 7.",
] * 3


def make_target_folder(folder: Path, family: str = "qwen3", seed: int = 0) -> Path:
    """A random target of a few thousand parameters with tokenizer and template, as `save_pretrained` writes
    it."""
    tokenizer = train_tokenizer(TEXTS)
    torch.manual_seed(seed)
    sizes = SIZES | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    if family == "qwen3":
        model: torch.nn.Module = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)  # sharper distributions than a fresh model has, so that sampling matters
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# What each family does differently: windows, soft caps, scaled logits, experts, recurrent layers.
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "qwen3_moe": MOE,
    "qwen3_next": MOE | LINEAR | {"shared_expert_intermediate_size": 16},
}


def make_family(family: str, **changes: Any) -> TransformersTarget:
    """A random model of the family, in float64 where torch has the kernels (experts have none)."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(sizes | FAMILIES[family] | changes))
    )
    if "num_experts" not in FAMILIES[family]:
        model = model.double()
    return TransformersTarget(model, TargetInfo("random", None, "f", 300, 32, 4, (2,), 256, family))

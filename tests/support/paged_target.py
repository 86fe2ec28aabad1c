"""Random targets of every family in the engine's table, and passes over them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from draftkit.engine.paged_model import PagedModel
from draftkit.engine.passes import Pass
from draftkit.target.interface import TargetInfo
from draftkit.target.transformers import TransformersTarget

BLOCK, VOCAB = 4, 256
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LAYERS = ["sliding_attention", "full_attention", "full_attention"]
FAMILIES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)),
    "qwen3-wide": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=96)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}, attention_bias=True
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=24, sliding_window=9)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            head_dim=32,
            query_pre_attn_scalar=20,
            sliding_window=6,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
            attn_implementation="eager",
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=32, query_pre_attn_scalar=20, sliding_window=6, layer_types=LAYERS)
    ),
    "gemma4": lambda: Gemma4ForCausalLM(
        Gemma4TextConfig(
            **SIZES,
            head_dim=16,
            global_head_dim=32,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            sliding_window=6,
            layer_types=LAYERS,
            hidden_size_per_layer_input=0,
            final_logit_softcapping=2.0,
        )
    ),
}


def wrap(model: PreTrainedModel) -> TransformersTarget:
    config = model.config
    info = TargetInfo(
        "t", None, "f", config.vocab_size, config.hidden_size, config.num_hidden_layers, (), 128, "t"
    )
    return TransformersTarget(model, info)


def build(family: str, dtype: torch.dtype = torch.float32) -> tuple[TransformersTarget, PagedModel]:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        elif parameter.ndim == 2:
            parameter.data.mul_(4)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    target = wrap(model.to(dtype))
    return target, PagedModel(target, slots=40 * BLOCK, max_length=128)


def one_pass(pieces: list[tuple[list[int], int, list[int]]], dtype: torch.dtype = torch.float32) -> Pass:
    """Pieces: (tokens, first position, block table)."""
    width = max(len(table) for _, _, table in pieces)
    return Pass(
        np.concatenate([np.array(tokens) for tokens, _, _ in pieces]),
        np.array([start for _, start, _ in pieces]),
        np.array([len(tokens) for tokens, _, _ in pieces]),
        np.array([table + [0] * (width - len(table)) for _, _, table in pieces]),
        BLOCK,
        torch.device("cpu"),
        dtype,
    )


TEXTS = [
    torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (50, 9, 23)
]
TABLES = [[5, 30, 2, 17, 9, 33, 0, 21, 12, 3, 7, 26, 14], [1, 4, 6], [8, 10, 11, 13, 15, 16]]

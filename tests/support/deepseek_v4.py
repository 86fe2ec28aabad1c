"""DeepSeek-V4 at the size of a test: raw `config.json`s, random targets, and checkpoints with DeepSeek's
names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.checkpoint_fields import Fields
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter, DeepseekV4Shape
from draftkit.draft.deepseek_v4_checkpoint import read_shape, read_sizes
from draftkit.target.deepseek_v4 import place_of
from draftkit.target.deepseek_v4_tensors import checkpoint_tensors
from draftkit.target.fp8_fp4 import quantise_fp4, quantise_fp8
from draftkit.target.interface import TargetInfo
from draftkit.target.transformers import TransformersTarget

# keys and values as DeepSeek publishes them
FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "vocab_size": 129280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "expert_dtype": "fp4",
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0, 0, 0],
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}
PRO = FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.5,
    "index_topk": 1024,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4] + [0, 0, 0],
    "dspark_target_layer_ids": [58, 59, 60],
    "dspark_markov_rank": 512,
}

TINY: dict[str, Any] = FLASH | {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "sliding_window": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "rope_scaling": FLASH["rope_scaling"] | {"original_max_position_embeddings": 256},
    "max_position_embeddings": 512,
    "vocab_size": 96,
    "compress_ratios": [0, 0, 4, 128, 4, 0, 0, 0],
    "dspark_noise_token_id": 95,
    "dspark_target_layer_ids": [2, 3, 4],
    "dspark_markov_rank": 16,
}


def tiny_model(heavy: int = 128, seed: int = 0, **changes: Any) -> Any:
    """A random `DeepseekV4ForCausalLM` whose next tokens differ from place to place; its heavily compressed
    layers make one entry of `heavy` tokens."""
    torch.manual_seed(seed)
    config = DeepseekV4Config(
        **(TINY | changes),
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": heavy},
        initializer_range=0.15,
    )
    model = DeepseekV4ForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.rand(len(buffer), config.n_routed_experts).argsort(-1)[:, :2])
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model


def tiny_target(heavy: int = 128, seed: int = 0) -> TransformersTarget:
    """The random model as a target in float32; it never ends an answer."""
    model = tiny_model(heavy, seed)
    return TransformersTarget(model, TargetInfo("tiny-v4", None, "f", 96, 64, 5, (), 512, "deepseek_v4"))


def write_checkpoint(
    folder: Path, model: Any, raw: dict[str, Any] = TINY, quantised: bool = False, shards: int = 2
) -> Path:
    """`model` and a random DSpark module as DeepSeek writes them: its names, in shards with an index; FP8 and
    FP4 where `quantised`."""
    folder.mkdir(parents=True, exist_ok=True)
    specs, state = checkpoint_tensors(raw), model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if name.endswith(".scale"):
            continue
        if name.startswith("mtp."):
            wide = spec.dtype == "I8"
            shape = (spec.shape[0], 2 * spec.shape[1]) if wide else spec.shape
            value = torch.randn(shape) * 0.15 + float(name.endswith("norm.weight"))
        else:
            place = place_of(name)
            value = place.part_of(state[place.name]).clone()
        scale = name.removesuffix("weight") + "scale"
        if quantised and spec.dtype in ("I8", "F8_E4M3"):
            quantise = quantise_fp4 if spec.dtype == "I8" else quantise_fp8
            tensors[name], tensors[scale] = quantise(value)
        else:
            tensors[name] = value.contiguous()
    names = sorted(tensors)
    cut = -(-len(names) // shards)
    places = {}
    for number in range(shards):
        part = names[number * cut : (number + 1) * cut]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    more = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(raw | (more if quantised else {})))
    return folder


def tiny_shape(**changes: Any) -> DeepseekV4Shape:
    """The shape of the tiny target's draft module."""
    fields = Fields(TINY, "tiny")
    shape = read_shape(fields, read_sizes(fields, "deepseek_v4", None))
    return replace(shape, **changes)


def tiny_drafter(target: TransformersTarget, spread: float = 0.15, **changes: Any) -> DeepseekV4Drafter:
    """A random draft module whose proposals differ from place to place."""
    torch.manual_seed(1)
    drafter = new_drafter(tiny_shape(**changes), target.embedding_weight(), target.head_weight())
    assert isinstance(drafter, DeepseekV4Drafter)
    for name, parameter in drafter.named_parameters():
        if parameter.requires_grad and (parameter.ndim > 1 or name.endswith("sinks")):
            torch.nn.init.normal_(parameter, std=spread)
    return drafter.eval()

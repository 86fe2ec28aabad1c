"""Configurations of DeepSeek-V4 as they are published, and a tiny one of the same kind.

`python -m tools.v4_configs flash|pro FOLDER` writes the published `config.json` and says what such a
checkpoint holds: `draftkit plan --set target.path=FOLDER` needs no more of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from draftkit.target.deepseek_v4_tensors import checkpoint_tensors, draft_tensors, total_bytes, total_weights

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
PRO: dict[str, Any] = FLASH | {
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
    "hc_sinkhorn_iters": 4,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "rope_scaling": FLASH["rope_scaling"] | {"original_max_position_embeddings": 256},
    "max_position_embeddings": 4096,
    "vocab_size": 96,
    "compress_ratios": [0, 0, 4, 128, 4, 0, 0, 0],
    "dspark_noise_token_id": 95,
    "dspark_target_layer_ids": [2, 3, 4],
    "dspark_markov_rank": 16,
}

QUANTISED: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
}


def held(raw: dict[str, Any]) -> str:
    """What a checkpoint of this configuration holds, in one line."""
    every, module = checkpoint_tensors(raw), draft_tensors(raw)
    size, own = total_bytes(every) / 1e9, total_bytes(module) / 1e9
    billions = total_weights(module) / 1e9
    return (
        f"{len(every):,} tensors, {size:,.2f} GB; the draft module {len(module):,} of them, {own:,.2f} GB, "
        f"{billions:,.2f} billion weights"
    )


def main(name: str, folder: str) -> None:
    """Write one and describe it."""
    raw = {"flash": FLASH, "pro": PRO}[name] | QUANTISED
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    print(held(raw))


if __name__ == "__main__":
    main(*sys.argv[1:])

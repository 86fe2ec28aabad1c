"""Configurations as the published drafters have them: each is read as what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftkit.draft.checkpoint import read_config

QWEN3_8B = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA4_12B = {
    "attention_bias": False,
    "attention_k_eq_v": True,
    "enable_moe_block": False,
    "final_logit_softcapping": None,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3840,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 15360,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 131072,
    "num_attention_heads": 16,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 48,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "vocab_size": 262144,
}
QWEN_IDS, GEMMA_IDS = [1, 9, 17, 25, 33], [5, 17, 29, 41, 46]
DSPARK_FIELDS = {
    "block_size": 7,
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "num_anchors": 512,
}
MARKOV_FIELDS = {"markov_rank": 256, "markov_head_type": "vanilla"}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DeepSpec's DSpark": (
        QWEN3_8B
        | DSPARK_FIELDS
        | MARKOV_FIELDS
        | {"architectures": ["Qwen3DSparkModel"], "target_layer_ids": QWEN_IDS}
        | {"mask_token_id": 151669, "num_target_layers": 36},
        {
            "head": "markov",
            "layout": "anchor",
            "gamma": 7,
            "style": "qwen3",
            "confidence": True,
            "head_dim": 128,
        },
    ),
    "DeepSpec's DSpark for Gemma 4": (
        GEMMA4_12B
        | DSPARK_FIELDS
        | MARKOV_FIELDS
        | {"architectures": ["Gemma4DSparkModel"], "target_layer_ids": GEMMA_IDS, "mask_token_id": 4},
        {
            "style": "gemma4",
            "head_dim": 512,
            "num_kv_heads": 1,
            "rotary_share": 0.25,
            "soft_cap": None,
            "gamma": 7,
        },
    ),
    "DeepSpec's DFlash": (
        QWEN3_8B
        | {
            "architectures": ["Qwen3DSparkModel"],
            "block_size": 7,
            "enable_confidence_head": False,
            "markov_rank": 0,
        }
        | {"target_layer_ids": QWEN_IDS, "mask_token_id": 151669, "num_target_layers": 36},
        {"algorithm": "dflash", "head": "none", "layout": "anchor", "gamma": 7},
    ),
    "z-lab's DFlash": (
        QWEN3_8B
        | {"architectures": ["DFlashDraftModel"], "block_size": 16, "num_target_layers": 36}
        | {"dflash_config": {"mask_token_id": 151669, "target_layer_ids": QWEN_IDS}},
        {"algorithm": "dflash", "layout": "one_plus_n", "gamma": 15, "mask_token_id": 151669},
    ),
    "DeepSpec's EAGLE-3": (
        QWEN3_8B
        | {
            "architectures": ["Qwen3Eagle3Model"],
            "num_hidden_layers": 1,
            "num_target_layers": 36,
            "ttt_length": 7,
        }
        | {"target_layer_ids": QWEN_IDS, "step_loss_decay": 0.8, "draft_num_hidden_layers": 1},
        {
            "algorithm": "eagle3",
            "style": "qwen3",
            "gamma": 7,
            "draft_vocab_size": None,
            "feature_layers": (1, 9, 17, 25, 33),
        },
    ),
    "the EAGLE authors' form": (
        {k: v for k, v in QWEN3_8B.items() if k not in ("head_dim", "rope_theta")}
        | {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 32000},
        {
            "style": "llama",
            "draft_vocab_size": 32000,
            "feature_layers": (1, 17, 32),
            "head_dim": 128,
            "rope_theta": 10_000.0,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_without_a_flag(name: str, tmp_path: Path) -> None:
    """Fields as the published folders have them; the target is asked for its depth where they do not say
    it."""
    fields, wanted = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shape = read_config(tmp_path, num_target_layers=36)
    assert {key: getattr(shape, key) for key in wanted} == wanted
    assert shape.num_target_layers == (48 if "Gemma" in name else 36)

"""A small Llama as a GGUF file, written as llama.cpp's converter writes it, and the Transformers model that
it holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS = 4, 2
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def small_llama(vocab_size: int) -> LlamaForCausalLM:
    """Random weights, four layers, tied embedding and head."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "head_dim": 16,
    }
    heads: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    rest: dict[str, Any] = {"max_position_embeddings": 256, "tie_word_embeddings": True, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **heads, **rest)).eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer_folder: Path,
    arch: str = "llama",
    parts: Sequence[Path] = (),
    split: str = "qwen2",
) -> None:
    """Write one file, or, with `parts`, the tensors spread over several as llama.cpp splits them.

    `split` is llama.cpp's name for how the tokenizer splits text; "qwen2" is what the embedded target's does.
    """
    tensors = _tensors(model)
    files = list(parts) or [path]
    for number, file in enumerate(files):
        writer = gguf.GGUFWriter(file, arch)
        if number == 0:
            _write_metadata(writer, model.config, tokenizer_folder, split)
        if parts:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", len(files))
        for name, array in tensors[number :: len(files)]:
            if array.ndim == 2 and array.shape[1] % 32 == 0 and name != "token_embd.weight":
                packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def quantised(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with every matrix but the embedding rounded to Q8_0 and back, which is what the file
    holds."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            packed = gguf.quants.quantize(weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            weight.data = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    return model


def _tensors(model: LlamaForCausalLM) -> list[tuple[str, np.ndarray]]:
    weights = {name: weight.detach().numpy() for name, weight in model.model.named_parameters()}
    named = [
        ("token_embd.weight", weights["embed_tokens.weight"]),
        ("output_norm.weight", weights["norm.weight"]),
    ]
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            array = weights[f"layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):  # ggml rotates neighbours where Transformers rotates halves
                heads = HEADS if ours == "attn_q" else KV_HEADS
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            named.append((f"blk.{layer}.{ours}.weight", array))
    return named


def _write_metadata(writer: gguf.GGUFWriter, config: LlamaConfig, tokenizer_folder: Path, split: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_tokens)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in model["merges"]])
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)

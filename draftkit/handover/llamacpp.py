"""Block drafters as GGUF, as llama.cpp's `draft-dspark` and `draft-dflash` read them.

Names and fields are those of its converter (conversion/qwen.py, `DFlashModel` and `DSparkModel`) and of
src/models/dflash.cpp at the commit that `handover/engines.py` names. Tokenizer fields are copied from the
target's GGUF, with which the drafter is served; embedding and a whole head are the target's own tensors there
and are left out here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import Drafter, DrafterConfig
from draftkit.errors import CheckpointError
from draftkit.target.gguf import gguf_in, gguf_package, smollm2_file

ARCHITECTURE = "dflash"
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROOT = {
    "fc": "fc",
    "hidden_norm": "enc.output_norm",
    "norm": "output_norm",
    "lm_head": "output",
    "markov_head.markov_w1": "markov_w1",
    "markov_head.markov_w2": "markov_w2",
    "confidence_head.proj": "conf_proj",
}


def target_gguf(target: str) -> Path:
    """The GGUF file that llama-server will run. Raises CheckpointError when the target is none, TargetError
    when it is not there."""
    path = Path(target)
    if target == "smollm2" and not path.exists():
        return smollm2_file()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir() and list(path.glob("*.gguf")):
        return gguf_in(path)
    raise CheckpointError(
        f"--target {target}: llama.cpp serves GGUF files; give the file that llama-server will run (its "
        "tokenizer "
        "goes into the drafter's)"
    )


def write_gguf(drafter: Drafter, target: Path, out: Path, dtype: torch.dtype) -> None:
    """Write one file: norms, biases and the confidence head in float32, matrices in `dtype` (bfloat16 or
    float32). Raises CheckpointError for what llama.cpp has no file for."""
    gguf = gguf_package()
    config = drafter.config
    if (
        not isinstance(drafter, BlockDrafter)
        or not isinstance(config, DrafterConfig)
        or config.style != "qwen3"
        or config.only_run
    ):
        raise CheckpointError(
            "draftkit writes GGUF of block drafters with Qwen3's block; convert this one "
            f"({config.algorithm}, "
            f"{config.style}) with llama.cpp: convert_hf_to_gguf.py FOLDER --target-model-dir TARGET"
        )
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    _write_fields(writer, drafter, config, dtype)
    _copy_tokenizer(writer, gguf.GGUFReader(target), config)
    kind = gguf.GGMLQuantizationType.BF16 if dtype == torch.bfloat16 else gguf.GGMLQuantizationType.F32
    for name, tensor in gguf_tensors(drafter).items():
        if name == "d2t":
            writer.add_tensor(name, tensor.numpy(), raw_dtype=gguf.GGMLQuantizationType.I64)
        elif tensor.ndim < 2 or name.startswith("conf_proj"):
            writer.add_tensor(name, tensor.float().numpy())
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


def gguf_tensors(drafter: BlockDrafter) -> dict[str, Tensor]:
    """The tensors of the file by their names there; d2t holds target ids, not offsets."""
    found: dict[str, Tensor] = {}
    for name, tensor in drafter.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "embed_tokens" or (module == "lm_head" and drafter.draft_ids_W is None):
            continue
        if module.startswith("layers."):
            _, number, part = module.split(".", 2)
            theirs = f"blk.{number}.{_LAYER[part]}"
        else:
            theirs = _ROOT[module]
        found[f"{theirs}.{kind}"] = tensor.detach().cpu().contiguous()
    if drafter.draft_ids_W is not None:
        found["d2t"] = drafter.draft_ids_W.cpu().contiguous()
    return found


def _write_fields(writer: Any, drafter: BlockDrafter, config: DrafterConfig, dtype: torch.dtype) -> None:
    writer.add_type("model")
    writer.add_name(f"{config.algorithm} drafter")
    writer.add_file_type(32 if dtype == torch.bfloat16 else 0)  # MOSTLY_BF16, ALL_F32
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    if config.logit_scale != 1.0:
        writer.add_logit_scale(config.logit_scale)
    if config.soft_cap is not None:
        writer.add_final_logit_softcapping(config.soft_cap)
    key = ARCHITECTURE + ".{}"
    writer.add_uint32(key.format("block_size"), config.block_size)
    writer.add_array(key.format("target_layers"), [i + 1 for i in config.feature_layers])  # inputs, from 0
    writer.add_bool(key.format("sample_from_anchor"), config.layout == "anchor")
    writer.add_bool(key.format("has_confidence_head"), config.confidence)


def _copy_tokenizer(writer: Any, reader: Any, config: DrafterConfig) -> None:
    """The target's tokenizer, and the mask token. Raises CheckpointError when it is of another vocabulary."""
    import gguf

    fields = [f for f in reader.fields.values() if f.name.startswith("tokenizer.")]
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if tokens is None or len(tokens.data) != config.vocab_size:
        held = "no tokenizer" if tokens is None else f"{len(tokens.data)} tokens"
        raise CheckpointError(
            f"the target's GGUF holds {held}, the drafter's vocabulary is {config.vocab_size}; give the "
            "target that "
            "this drafter was trained for"
        )
    for field in fields:
        if field.name in ("tokenizer.chat_template", "tokenizer.ggml.mask_token_id"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_mask_token_id(config.mask_token_id)

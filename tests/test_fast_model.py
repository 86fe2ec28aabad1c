"""The lean forward equals the Transformers module: any family of the table, any way of cutting tokens into passes."""

from __future__ import annotations

import numpy as np
import pytest
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

from draftkit.engine.fast_model import FastModel, unsupported
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
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LAYERS = ["sliding_attention", "full_attention", "full_attention"]
FAMILIES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)),
    "qwen3-wide": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=96)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}, attention_bias=True)
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
    info = TargetInfo("t", None, "f", config.vocab_size, config.hidden_size, config.num_hidden_layers, (), 128, "t")
    return TransformersTarget(model, info)


def build(family: str, dtype: torch.dtype = torch.float32) -> tuple[TransformersTarget, FastModel]:
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
    return target, FastModel(target, slots=40 * BLOCK, max_length=128)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers_in_pieces_beside_others(family: str) -> None:
    target, fast = build(family)
    assert unsupported(target) is None
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (50, 9, 23)]
    order = torch.randperm(40, generator=generator).tolist()
    tables = [order[0:13], order[13:16], order[16:22]]  # pages lie anywhere
    cuts = [[0, 40, 41, 50], [0, 3, 8, 9], [0, 1, 9, 23]]
    logits: list[list[torch.Tensor]] = [[], [], []]
    features: list[list[torch.Tensor]] = [[], [], []]
    for turn in range(3):
        pieces = [(texts[r][cuts[r][turn] : cuts[r][turn + 1]], cuts[r][turn], tables[r]) for r in range(3)]
        step = one_pass(pieces)
        read = fast.read(step, None, (0, 1))
        assert read.features_TF is not None
        for r, (first, last) in enumerate(zip(step.firsts_R, step.ends_R, strict=True)):
            logits[r].append(read.logits_WV[first:last])
            features[r].append(read.features_TF[first:last])
    for r, text in enumerate(texts):
        wanted = target.forward(torch.tensor([text]), None, (0, 1))
        torch.testing.assert_close(torch.cat(logits[r]), target.logits(wanted.last_hidden_BTH)[0], atol=1e-4, rtol=1e-4)
        assert wanted.features_BTF is not None
        torch.testing.assert_close(torch.cat(features[r]), wanted.features_BTF[0], atol=1e-4, rtol=1e-4)


def test_only_wanted_rows_get_logits() -> None:
    _, fast = build("qwen3")
    step = one_pass([([1, 2, 3], 0, [5]), ([4, 5], 0, [7])])
    rows = fast.read(step, torch.tensor([2, 4])).logits_WV
    torch.testing.assert_close(rows, fast.read(step, None).logits_WV[[2, 4]], atol=1e-5, rtol=1e-5)


def test_a_drafters_block_sees_all_of_itself() -> None:
    """With `block` the first token's output depends on the last token; without it does not."""
    _, fast = build("qwen3")
    outputs = {}
    for block in (True, False):
        for last in (7, 8):
            step = one_pass([([1, 2, last], 0, [5])])
            if block:
                step = Pass(
                    step.tokens_T, step.starts_R, step.lengths_R, step.tables_RB, BLOCK, step.device, step.dtype, True
                )
            outputs[block, last] = fast.read(step, torch.tensor([0])).logits_WV
    assert torch.equal(outputs[False, 7], outputs[False, 8])
    assert not torch.allclose(outputs[True, 7], outputs[True, 8])


def test_families_outside_the_table_say_why() -> None:
    target, _ = build("qwen3")
    target.model.config.rope_parameters = {"rope_type": "dynamic"}
    assert unsupported(target) == "rotary embedding of type dynamic"
    gemma, _ = build("gemma4")
    gemma.model.config.hidden_size_per_layer_input = 8
    assert unsupported(gemma) == "embeddings per layer"
    target.model.config.model_type = "other"
    assert "not in the table" in str(unsupported(target))

"""Shared by all tests: no network, one thread per process, and small targets that the tests make."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.environ.setdefault("CUDA_VISIBLE_DEVICES", ""):  # the same tests everywhere; benchmarks/gpu_check.py is for a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, slowly

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from draftkit.target.transformers import TransformersTarget, load_target
from draftkit.tiny.tokenizer import train_tokenizer

torch.set_num_threads(1)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
TEXTS = ["def add(a, b):\n    return a + b\n", "What is a list? A list holds values.", "Step 1: 3 + 4 = 7."] * 3


def make_target_folder(folder: Path, family: str = "qwen3", seed: int = 0) -> Path:
    """A random target of a few thousand parameters with tokenizer and template, as `save_pretrained` writes it."""
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


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3."""
    return make_target_folder(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def target(target_folder: Path) -> TransformersTarget:
    """The small random Qwen3, loaded in float64: no greedy tie can be settled by rounding."""
    return load_target(str(target_folder), dtype="float64")

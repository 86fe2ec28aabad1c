"""Folders of block drafters: what they hold, and what is wrong with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftkit.draft.checkpoint import load_drafter, save_drafter
from draftkit.draft.drafter import HEADS
from draftkit.errors import CheckpointError, ConfigError
from support.drafters import BLOCK_CONFIG as CONFIG
from support.drafters import block_drafter

LENGTH = 20


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_comes_back_as_it_was(head: str, tmp_path: Path) -> None:
    drafter = block_drafter(head=head, markov_rank=6 if head != "none" else 0, confidence=head != "none")
    save_drafter(drafter, tmp_path, {"target": "x"}, torch.float32)
    again = load_drafter(tmp_path)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in drafter.state_dict().items()
    }
    assert again.config.head == head
    assert again.config.feature_layers == (0, 2)


def test_the_layout_is_the_portable_one(tmp_path: Path) -> None:
    """Names and fields that vLLM, SGLang and llama.cpp look for."""
    save_drafter(block_drafter(), tmp_path, {}, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["target_layer_ids"] == [0, 2]
    assert config["enable_confidence_head"] is config["confidence_head_with_markov"] is True
    assert (config["block_size"], config["mask_token_id"], config["markov_rank"]) == (4, 3, 6)
    assert config["markov_head_type"] == "vanilla"
    assert config["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    assert shapes["fc.weight"] == (16, 32)
    assert shapes["markov_head.markov_w1.weight"] == shapes["markov_head.markov_w2.weight"] == (40, 6)
    assert shapes["confidence_head.proj.weight"] == (1, 22)
    assert shapes["layers.1.self_attn.k_norm.weight"] == (8,)
    assert {"embed_tokens.weight", "lm_head.weight", "hidden_norm.weight", "norm.weight"} <= shapes.keys()
    assert not [name for name in shapes if name.startswith("model.")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"fc.weight": torch.zeros(16, 31)},
            r"fc\.weight is \(16, 31\), the configuration says \(16, 32\)",
        ),
        (lambda t: {k: v for k, v in t.items() if k != "norm.weight"}, r"missing norm\.weight"),
        (lambda t: t | {"extra.weight": torch.zeros(2)}, r"unknown extra\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: object, message: str, tmp_path: Path) -> None:
    save_drafter(block_drafter(), tmp_path, {}, torch.float32)
    (tmp_path / "draftkit.json").unlink()  # as in folders of others, which say no sha256
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_drafter(tmp_path)
    save_drafter(block_drafter(), tmp_path, {}, torch.float32)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_drafter(tmp_path)
    (tmp_path / "draftkit.json").unlink()  # as in folders of others, which say no sha256
    with pytest.raises(CheckpointError, match="damaged"):
        load_drafter(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_drafter(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel is not known"):
        load_drafter(tmp_path)


def test_impossible_shapes_are_refused() -> None:
    for changes, message in (
        ({"head": "magic"}, "magic"),
        ({"layout": "diagonal"}, "diagonal"),
        ({"feature_layers": (2, 0)}, "ascending"),
        ({"layout": "one_plus_n", "block_size": 1}, "no token"),
        ({"num_kv_heads": 3}, "no multiple"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(CONFIG, **changes)  # type: ignore[arg-type]

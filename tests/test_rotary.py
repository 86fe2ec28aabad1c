"""Scaled rotary embeddings: a drafter turns by the angles that Transformers gives the same configuration,
in training, drafting and the engine, and a folder keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from draftkit.draft.backbone import rope_table
from draftkit.draft.checkpoint import load_drafter, new_drafter, save_drafter
from draftkit.draft.families import block_shape
from draftkit.draft.rotary import scaling_of
from draftkit.engine.paged_drafter import rotary_of
from draftkit.errors import CheckpointError, ConfigError
from support.drafters import BLOCK_CONFIG, EAGLE_CONFIG

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
SCALINGS = {"llama3": LLAMA3, "yarn": YARN, "linear": LINEAR}


def of_transformers(scaling: dict[str, Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, D] of a Llama with BLOCK_CONFIG's attention."""
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": BLOCK_CONFIG.rope_theta, **scaling},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_are_those_of_transformers(kind: str) -> None:
    config = replace(BLOCK_CONFIG, rope_scaling=SCALINGS[kind])
    cos, sin = of_transformers(SCALINGS[kind], 60)
    table = rope_table(config, 60)
    torch.testing.assert_close(table[:, 0], cos)
    torch.testing.assert_close(table[:, 1], sin)
    assert not torch.allclose(table, rope_table(BLOCK_CONFIG, 60))


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_engine_turns_by_the_same_angles(kind: str) -> None:
    config = replace(BLOCK_CONFIG, rope_scaling=SCALINGS[kind])
    engine, table = rotary_of(config, 40, torch.zeros(1)), rope_table(config, 40)
    half = config.head_dim // 2
    torch.testing.assert_close(engine[:40, 0].real, table[:, 0, :half])
    torch.testing.assert_close(engine[:40, 0].imag, table[:, 1, :half])


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("base", [BLOCK_CONFIG, EAGLE_CONFIG], ids=["block", "EAGLE-3"])
def test_a_folder_keeps_the_scaling(tmp_path: Path, kind: str, base: Any) -> None:
    config = replace(base, rope_scaling=SCALINGS[kind])
    drafter = new_drafter(config, torch.randn(40, 16), torch.randn(40, 16))
    save_drafter(drafter, tmp_path, {}, torch.float32)
    assert load_drafter(tmp_path).config == config


def test_a_drafter_gets_the_scaling_of_its_target() -> None:
    text = LlamaConfig(rope_parameters={"rope_theta": 500_000.0, **LLAMA3})
    shape = block_shape(text, "qwen3")
    assert shape.rope_scaling == LLAMA3 and shape.rope_theta == 500_000.0
    assert block_shape(LlamaConfig(), "qwen3").rope_scaling is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"rope_type": "longrope", "factor": 2.0},
            "'longrope' is not known for drafters; known are default, llama3",
        ),
        ({"type": "dynamic", "factor": 2.0}, "'dynamic' is not known"),
        ({"rope_type": "yarn"}, "factor is None"),
        ({"rope_type": "yarn", "factor": "4"}, "factor is '4'"),
        ({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": -1}, "low_freq_factor is -1"),
    ],
)
def test_kinds_that_change_with_the_length_and_wrong_numbers_are_refused(
    wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        scaling_of(wrong)


def test_a_llama3_scaling_without_its_numbers_is_an_error_of_the_folder(tmp_path: Path) -> None:
    drafter = new_drafter(BLOCK_CONFIG, torch.randn(40, 16), torch.randn(40, 16))
    save_drafter(drafter, tmp_path, {}, torch.float32)
    text = (tmp_path / "config.json").read_text("utf-8")
    broken = text.replace('"rope_type": "default"', '"rope_type": "llama3", "factor": 8.0')
    (tmp_path / "config.json").write_text(broken)
    (tmp_path / "draftkit.json").unlink()
    with pytest.raises(CheckpointError, match="low_freq_factor"):
        load_drafter(tmp_path)

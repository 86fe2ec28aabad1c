"""Quantised checkpoints: loaded with their scales, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from draftkit.engine.paged_model import unsupported
from draftkit.errors import TargetError
from draftkit.target.loading import load_target
from support.targets import make_target_folder

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.fixture
def fp8_folder(tmp_path: Path) -> Path:
    """A small Qwen3 whose matrices are float8 with one scale each, as DeepSeek and Qwen publish them."""
    folder = make_target_folder(tmp_path / "fp8")
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim == 2 and "embed" not in name:
            scale = (weight.abs().max() / 448).reshape(1, 1)
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
            weights[name.replace("weight", "weight_scale_inv")] = scale
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def describe(folder: Path, quantisation: dict[str, Any] | None) -> str:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | ({"quantization_config": quantisation} if quantisation else {}))
    )
    return str(folder)


def test_fp8_weights_are_multiplied_by_their_scales(fp8_folder: Path) -> None:
    target = load_target(describe(fp8_folder, FP8))
    raw = load_file(fp8_folder / "model.safetensors")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        wanted = raw[f"model.layers.2.{name}.weight"].float() * raw[f"model.layers.2.{name}.weight_scale_inv"]
        found = target.layers[2].get_submodule(name).weight.float()
        assert torch.allclose(found, wanted, rtol=2**-7), "up to bfloat16, in which Transformers dequantises"


@pytest.mark.parametrize("quantisation", [None, {"quant_method": "mxfp4"}])
def test_scales_that_would_be_left_out_are_refused(
    fp8_folder: Path, quantisation: dict[str, Any] | None
) -> None:
    with pytest.raises(
        TargetError, match=r"28 quantisation scales would be left out, model\.layers\.0.*scale_inv first"
    ):
        load_target(describe(fp8_folder, quantisation))


@pytest.mark.parametrize(
    ("quantisation", "word"),
    [
        ({"quant_method": "plankton"}, "is quantised by 'plankton', which Transformers does not read"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
            r"cannot load a target: .*GPTQ",
        ),
        ({"quant_method": "awq", "bits": 4}, r"cannot load a target: .*(?i:awq|gptq)"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            r"cannot load a target: compressed-tensors.* required",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"cannot load a target: .*bitsandbytes"),
    ],
)
def test_a_form_whose_package_is_missing_is_one_line(
    fp8_folder: Path, quantisation: dict[str, Any], word: str
) -> None:
    with pytest.raises(TargetError, match=word) as raised:
        load_target(describe(fp8_folder, quantisation))
    assert "\n" not in str(raised.value)


def test_the_engine_reads_no_bare_weights_of_a_layer_that_is_no_plain_matrix(target_folder: Path) -> None:
    class Scaled(nn.Linear):
        """As the quantised layers of libraries: its weight alone is not what it multiplies by."""

    target = load_target(str(target_folder))
    assert unsupported(target) is None
    target.layers[1].mlp.up_proj.__class__ = Scaled
    assert unsupported(target) == "layers of type Scaled"

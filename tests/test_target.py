"""Targets behind the seam: features of the right layers, caches that crop, and folders that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_target_folder

from draftkit.errors import TargetError
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import load_target, spread_feature_layers

TOKENS = torch.tensor([[5, 30, 7, 61, 12, 9, 44, 3]])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_features_are_the_outputs_of_the_named_layers(family: str, tmp_path: Path) -> None:
    target = load_target(str(make_target_folder(tmp_path, family)))
    output = target.forward(TOKENS, None, (0, 2))
    states = target.model(TOKENS, output_hidden_states=True)
    wanted = torch.cat([states.hidden_states[1], states.hidden_states[3]], -1)
    torch.testing.assert_close(output.features_BTF, wanted)
    torch.testing.assert_close(target.logits(output.last_hidden_BTH), states.logits)
    assert target.forward(TOKENS, None).features_BTF is None
    assert target.info.family == family


def test_pieces_with_a_cropped_cache_equal_one_pass(target_folder: Path) -> None:
    target = load_target(str(target_folder))
    whole = target.forward(TOKENS, None, (1,))
    cache = target.new_cache()
    target.forward(TOKENS[:, :5], cache, (1,))
    target.forward(torch.tensor([[99, 98]]), cache, (1,))  # read in vain
    cache.crop(4)
    assert cache.length == 4
    rest = target.forward(TOKENS[:, 4:], cache, (1,))
    torch.testing.assert_close(rest.last_hidden_BTH, whole.last_hidden_BTH[:, 4:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rest.features_BTF, whole.features_BTF[:, 4:], atol=1e-5, rtol=1e-4)  # type: ignore[index]


def test_bad_folders_and_settings_are_named(target_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="dtype 'int4'"):
        load_target(str(target_folder), dtype="int4")
    with pytest.raises(TargetError, match=r"no config\.json"):
        load_target(str(tmp_path))
    (tmp_path / "config.json").write_text((target_folder / "config.json").read_text())
    with pytest.raises(TargetError, match=r"has no \*\.safetensors"):
        load_target(str(tmp_path))
    with pytest.raises(TargetError, match="cannot load"):
        load_target("nobody/nothing-here")
    target = load_target(str(target_folder))
    for layers in ((3,), (-1, 0), (1, 1)):
        with pytest.raises(TargetError, match="between 0 and 2"):
            target.forward(TOKENS, None, layers)


def test_a_tokenizer_without_a_template_is_refused(target_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(target_folder))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((target_folder / name).read_bytes())
    with pytest.raises(TargetError, match="chat template is needed"):
        load_tokenizer(str(tmp_path))


def test_the_fingerprint_follows_the_weights(target_folder: Path, tmp_path: Path) -> None:
    first = load_target(str(target_folder)).info.fingerprint
    assert load_target(str(target_folder)).info.fingerprint == first
    assert load_target(str(make_target_folder(tmp_path, seed=1))).info.fingerprint != first


def test_feature_layers_spread_evenly() -> None:
    assert spread_feature_layers(5, 14) == (1, 4, 6, 9, 12)
    assert spread_feature_layers(1, 14) == (12,)
    with pytest.raises(TargetError, match="choose 1 to 2"):
        spread_feature_layers(5, 4)

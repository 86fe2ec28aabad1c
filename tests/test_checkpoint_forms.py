"""Drafter folders of every form: read as what they are, written as other engines expect them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from draftkit import cli
from draftkit.draft.checkpoint import load_drafter, read_config, save_drafter
from draftkit.errors import CheckpointError, ConfigError
from draftkit.target.transformers import TransformersTarget
from support.checkpoints import DFLASH, SHAPES, drafter_for, edit, same
from support.drafters import BLOCK_CONFIG as BLOCK
from support.drafters import EAGLE_CONFIG as EAGLE
from support.drafters import GEMMA


def test_zlabs_dflash_is_written_as_their_loaders_expect(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(drafter_for(target, SHAPES["dflash 1+N"]), tmp_path, {}, torch.bfloat16)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["DFlashDraftModel"]
    assert fields["model_type"] == "qwen3"
    assert (fields["block_size"], fields["dflash_config"]) == (
        4,
        {"mask_token_id": 3, "target_layer_ids": [0, 2]},
    )
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "model.safetensors").items()}
    assert "embed_tokens.weight" not in shapes
    assert shapes["fc.weight"] == (32, 64)
    assert {"hidden_norm.weight", "norm.weight", "layers.1.self_attn.q_norm.weight"} <= shapes.keys()


def test_gemma4_folders_have_the_fields_of_their_family(target: TransformersTarget, tmp_path: Path) -> None:
    drafter = drafter_for(target, SHAPES["gemma4"])
    save_drafter(drafter, tmp_path, {}, torch.float32)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["architectures"], fields["model_type"]) == (["Gemma4DSparkModel"], "gemma4_text")
    assert (fields["global_head_dim"], fields["num_global_key_value_heads"], fields["attention_k_eq_v"]) == (
        8,
        2,
        True,
    )
    rope = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10_000.0}
    assert fields["rope_parameters"]["full_attention"] == rope
    assert fields["final_logit_softcapping"] == 5.0
    assert not {"layers.0.self_attn.v_proj.weight"} & load_file(tmp_path / "model.safetensors").keys()
    wide = {"head_dim": 8, "num_key_value_heads": 2}  # as newer Transformers write it
    edit(
        tmp_path,
        global_head_dim=None,
        num_global_key_value_heads=None,
        head_dim=4,
        per_layer_config={"0": wide},
    )
    assert read_config(tmp_path) == drafter.config


def test_zlabs_nested_block_size_is_read(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(drafter_for(target, SHAPES["dflash 1+N"]), tmp_path, {}, torch.float32)
    nested = {"block_size": 6, "mask_token_id": 3, "target_layer_ids": [0, 2]}
    edit(tmp_path, block_size=None, dflash_config=nested)
    assert read_config(tmp_path).block_size == 6
    edit(tmp_path, dflash_config=nested | {"final_logit_softcapping": 20.0})
    assert read_config(tmp_path).soft_cap == 20.0
    edit(tmp_path, dflash_config=nested | {"attention_sink_bias": True})
    with pytest.raises(CheckpointError, match="field 'attention_sink_bias' is True; draftkit runs False"):
        load_drafter(tmp_path, target=target)


def test_portable_eagle3_has_the_layer_ids_of_every_engine(
    target: TransformersTarget, tmp_path: Path
) -> None:
    save_drafter(drafter_for(target, SHAPES["eagle3 reduced"]), tmp_path, {}, torch.bfloat16)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (fields["model_type"], fields["num_hidden_layers"], fields["draft_vocab_size"]) == ("llama", 1, 12)
    assert fields["eagle_aux_hidden_state_layer_ids"] == [1, 3]  # vLLM, llama.cpp: indices of hidden_states
    assert fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2]  # SGLang: outputs
    assert fields["norm_before_residual"] is True
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["lm_head.weight"].shape == (12, 32)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert (tensors["d2t"] + torch.arange(12)).tolist() == list(range(1, 36, 3))
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].nonzero().squeeze(-1).tolist() == list(range(1, 36, 3))
    assert not [n for n in tensors if "q_norm" in n or n.startswith("model.")]


def test_eagle3_with_norms_is_vllms_class_and_deepspecs_on_request(
    target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, SHAPES["eagle3 with norms"])
    save_drafter(drafter, tmp_path / "a", {}, torch.float32)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == [
        "Eagle3Qwen3ForCausalLM"
    ]
    save_drafter(drafter, tmp_path / "b", {}, torch.float32, form="deepspec")
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3Eagle3Model"]
    assert (fields["target_layer_ids"], fields["ttt_length"]) == ([0, 2], 5)
    assert "layers.0.self_attn.k_norm.weight" in load_file(tmp_path / "b" / "model.safetensors")
    again = load_drafter(tmp_path / "b")
    assert again.config == drafter.config
    assert same(again, drafter)


def test_a_reduced_block_drafter_is_what_vllm_reads_and_no_other_form_takes_it(
    target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, SHAPES["dspark reduced"])
    save_drafter(drafter, tmp_path, {}, torch.float32)
    fields, tensors = (
        json.loads((tmp_path / "config.json").read_text()),
        load_file(tmp_path / "model.safetensors"),
    )
    assert (fields["architectures"], fields["draft_vocab_size"]) == (["Qwen3DSparkModel"], 12)
    assert tensors["lm_head.weight"].shape == (12, 32) and tensors["markov_head.markov_w2.weight"].shape == (
        12,
        6,
    )
    assert tensors["markov_head.markov_w1.weight"].shape == (target.info.vocab_size, 6)
    assert (tensors["d2t"] + torch.arange(12)).tolist() == list(range(1, 36, 3))
    with pytest.raises(CheckpointError, match="DeepSpec drafts from the whole vocabulary"):
        save_drafter(drafter, tmp_path / "other", {}, torch.float32, form="deepspec")
    with pytest.raises(ConfigError, match="no engine loads a gemma4 block drafter of a reduced vocabulary"):
        replace(BLOCK, **GEMMA, draft_vocab_size=12)
    one_plus_n = drafter_for(target, replace(BLOCK, **DFLASH, layout="one_plus_n", draft_vocab_size=12))
    save_drafter(one_plus_n, tmp_path / "dflash", {}, torch.float32)  # z-lab's form has no head of its own
    assert json.loads((tmp_path / "dflash" / "config.json").read_text())["architectures"] == [
        "Qwen3DSparkModel"
    ]


@pytest.mark.parametrize("name", ["eagle3", "eagle3 reduced", "dspark reduced", "dflash 1+N"])
def test_a_form_that_cannot_hold_the_drafter_says_so(
    name: str, target: TransformersTarget, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="DeepSpec"):
        save_drafter(drafter_for(target, SHAPES[name]), tmp_path, {}, torch.float32, form="deepspec")
    with pytest.raises(CheckpointError, match="choose one of portable, deepspec"):
        save_drafter(drafter_for(target, SHAPES[name]), tmp_path, {}, torch.float32, form="gguf")
    assert not list(tmp_path.iterdir())


def test_eagle3_layers_come_from_wherever_they_are_named(target: TransformersTarget, tmp_path: Path) -> None:
    save_drafter(drafter_for(target, EAGLE), tmp_path, {}, torch.float32)
    edit(tmp_path, eagle_aux_hidden_state_layer_ids=None)
    assert read_config(tmp_path).feature_layers == (0, 2)
    edit(tmp_path, eagle_config=None, num_target_layers=36, ttt_length=None)
    assert read_config(tmp_path).feature_layers == (1, 17, 32)  # hidden states 2, n // 2, n - 3
    assert read_config(tmp_path).block_size == 7
    edit(tmp_path, num_target_layers=None)
    with pytest.raises(CheckpointError, match="'num_target_layers'; give its target too"):
        read_config(tmp_path)
    assert read_config(tmp_path, 12).feature_layers == (1, 5, 8)


def test_layer_names_of_both_kinds_and_shards_are_read(target: TransformersTarget, tmp_path: Path) -> None:
    drafter = drafter_for(target, SHAPES["eagle3 reduced"])
    save_drafter(drafter, tmp_path, {}, torch.float32)
    tensors = {
        k.replace("midlayer.", "layers.0."): v for k, v in load_file(tmp_path / "model.safetensors").items()
    }
    (tmp_path / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[:5]), dict(list(tensors.items())[5:])]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, half in zip(files, halves, strict=True):
        save_file(half, tmp_path / name)
    places = {k: name for name, half in zip(files, halves, strict=True) for k in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(load_drafter(tmp_path), drafter)
    save_file(dict(list(halves[1].items())[1:]), tmp_path / files[1])
    with pytest.raises(CheckpointError, match=f"the shards lack {next(iter(halves[1]))}"):
        load_drafter(tmp_path)
    (tmp_path / files[0]).unlink()
    with pytest.raises(
        CheckpointError, match=r"names model-00001-of-00002\.safetensors, which is not in the folder"
    ):
        load_drafter(tmp_path)


def test_export_writes_another_form_dtype_and_size(
    target_folder: Path, target: TransformersTarget, tmp_path: Path
) -> None:
    drafter = drafter_for(target, SHAPES["eagle3 with norms"])
    save_drafter(drafter, tmp_path / "a", {"target_fingerprint": target.info.fingerprint}, torch.float32)
    save_drafter(drafter, tmp_path / "b16", {}, torch.bfloat16)
    runner, base = CliRunner(), ["export", "-d", str(tmp_path / "a")]
    done = runner.invoke(
        cli.app, [*base, "-o", str(tmp_path / "b"), "--form", "deepspec", "--dtype", "float32"]
    )
    assert done.exit_code == 0, done.output
    assert same(load_drafter(tmp_path / "b"), drafter)
    done = runner.invoke(
        cli.app, [*base, "-o", str(tmp_path / "c"), "--target", str(target_folder), "--borrow"]
    )
    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    assert not {"embed_tokens.weight", "lm_head.weight"} & tensors.keys()
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    note = json.loads((tmp_path / "c" / "draftkit.json").read_text())
    assert (note["algorithm"], note["target_fingerprint"]) == ("eagle3", target.info.fingerprint)
    # a target of more bits than the drafter saved
    lent = ["--target", str(target_folder), "--borrow", "--dtype", "float32"]
    again = runner.invoke(cli.app, ["export", "-d", str(tmp_path / "b16"), "-o", str(tmp_path / "e"), *lent])
    assert again.exit_code == 0, again.output or again.exception
    assert (
        not {"embed_tokens.weight", "lm_head.weight"} & load_file(tmp_path / "e" / "model.safetensors").keys()
    )
    weights = tmp_path / "b" / "model.safetensors"
    before = weights.read_bytes()
    for arguments, message in (
        (["-o", str(tmp_path / "b")], f"{weights} is there; choose another place, or give --overwrite"),
        (["-o", str(tmp_path / "a")], "the drafter's own folder"),
        (["-o", str(tmp_path / "d"), "--borrow"], "needs the --target"),
        (["-o", str(tmp_path / "d"), "--dtype", "int8"], "choose one of float32"),
        (["-o", str(tmp_path / "d"), "--form", "gguf"], "choose one of portable"),
    ):
        assert message in str(runner.invoke(cli.app, [*base, *arguments]).exception)
    assert not list((tmp_path / "d").glob("*")) and weights.read_bytes() == before
    done = runner.invoke(cli.app, [*base, "-o", str(tmp_path / "b"), "--overwrite"])
    assert done.exit_code == 0 and weights.read_bytes() != before

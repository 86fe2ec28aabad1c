"""Weights by name: files say what the loaded model says, and what needs no model loads none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checks.forked import Ranks
from draftkit import feature_stages, stages, train_stages
from draftkit.config import Recipe, load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.draft.checkpoint import load_drafter, new_drafter
from draftkit.errors import TargetError
from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget
from draftkit.target.weights import TargetFiles
from support.drafters import make_drafter
from support.targets import FAMILIES, make_family, make_target_folder


@pytest.mark.parametrize("shards", ["5GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_the_models_embedding_head_layers_and_norm(
    family: str, shards: str, tmp_path: Path
) -> None:
    target = make_family(family)
    target.model.save_pretrained(tmp_path, max_shard_size=shards)
    files = TargetFiles(str(tmp_path), dtype="float64")
    assert torch.equal(files.embedding_weight(), target.embedding_weight().double())
    assert torch.equal(files.head_weight(), target.head_weight().double())
    tied = target.model.get_output_embeddings().weight is target.model.get_input_embeddings().weight
    assert (files.head_weight() is files.embedding_weight()) == tied
    if family.startswith("qwen3_"):
        return  # their experts lie in the files one by one
    for stored, layer in zip(files.layers, target.layers, strict=True):
        found, wanted = stored.state_dict(), layer.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if family != "gpt2":
        assert torch.equal(files.final_norm().state_dict()["weight"], target.final_norm().weight)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_files_say_about_themselves_what_the_loaded_target_says(family: str, tmp_path: Path) -> None:
    folder = str(make_target_folder(tmp_path, family))
    assert TargetFiles(folder).info == load_target(folder).info
    assert TargetFiles("tiny").info == load_target("tiny").info


def test_missing_damaged_and_quantised_files_are_named(tmp_path: Path) -> None:
    folder = make_target_folder(tmp_path / "target")
    with pytest.raises(TargetError, match="no such folder"):
        TargetFiles(str(tmp_path / "nothing"))
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(TargetError, match=r"model\.embed_tokens\.weight is quantised"):
        TargetFiles(str(folder)).embedding_weight()
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(TargetError, match=r"has no tensor model\.embed_tokens\.weight"):
        TargetFiles(str(folder)).embedding_weight()
    (folder / "model.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(TargetError, match="is damaged"):
        TargetFiles(str(folder))


def test_a_fresh_drafter_holds_no_copies_of_embedding_and_head(target_folder: Path) -> None:
    target = load_target(str(target_folder))
    config = make_drafter(target).config
    for weights in (target, TargetFiles(str(target_folder))):
        drafter = new_drafter(config, weights.embedding_weight(), weights.head_weight())
        assert drafter.embed_tokens.weight.data_ptr() == weights.embedding_weight().data_ptr()
        assert drafter.lm_head.weight.data_ptr() == weights.head_weight().data_ptr()
        assert not drafter.embed_tokens.weight.requires_grad and not drafter.lm_head.weight.requires_grad


def recipe_for(folder: Path, *more: str) -> Recipe:
    values = [
        "drafter.num_features=2",
        "drafter.num_layers=2",
        "drafter.block_size=3",
        "drafter.markov_rank=6",
    ]
    values += ["train.steps=2", "drafter.intermediate_size=null"]
    values += ["train.batch_size=4", "train.anchors=6", "train.validation_share=0.3"]
    return load_recipe("tiny-dspark", [f"target.path={folder}", *values, *more])


@pytest.fixture(scope="module")
def features(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe, folder = recipe_for(target_folder), tmp_path_factory.mktemp("features")
    said = [
        Conversation(
            str(i), "code", (Message("user", f"Add {i}."), Message("assistant", "A list holds values. " * 3))
        )
        for i in range(8)
    ]
    feature_stages.run_capture(*stages.open_target(recipe), recipe, said, folder)
    return folder


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a model was loaded")


def refuse_models() -> None:
    """From now on this process loads none."""
    AutoModelForCausalLM.from_pretrained = refuse


@pytest.mark.parametrize("start", ["random", "target"])
def test_training_from_a_store_and_export_load_no_model(
    start: str, target_folder: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And begin with the weights with which they begin beside a loaded target."""
    recipe = recipe_for(target_folder, "train.decode_prompts=0", f"drafter.start={start}")
    loaded = train_stages.new_drafter_for(recipe, *stages.open_target(recipe)).state_dict()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    found = train_stages.new_drafter_for(recipe, *stages.read_target(recipe)).state_dict()
    assert found.keys() == loaded.keys() and all(torch.equal(found[name], loaded[name]) for name in loaded)
    files, tokenizer = stages.read_target(recipe)
    source = feature_stages.open_features(recipe, files, tokenizer, [features])
    train_stages.run_train(files, tokenizer, recipe, source, tmp_path / "run")
    whole = stages.run_export(
        tmp_path / "run" / "best", tmp_path / "whole", "portable", "float32", None, False
    )
    lent = stages.run_export(
        tmp_path / "run" / "best", tmp_path / "lent", "portable", "bfloat16", str(target_folder), True
    )
    assert 0 < lent < whole / 2
    again = load_drafter(tmp_path / "lent", target=TargetFiles(str(target_folder)))
    assert torch.equal(again.embed_tokens.weight, TargetFiles(str(target_folder)).embedding_weight())


def test_answers_for_the_log_load_the_model_when_the_first_are_wanted(
    target_folder: Path, features: Path, tmp_path: Path
) -> None:
    recipe, asked = recipe_for(target_folder, "train.decode_prompts=2"), []

    def load() -> TransformersTarget:
        asked.append(1)
        return load_target(str(target_folder))

    files, tokenizer = stages.read_target(recipe)
    source = feature_stages.open_features(recipe, files, tokenizer, [features])
    train_stages.run_train(files, tokenizer, recipe, source, tmp_path, load)
    assert asked == [1]


@pytest.mark.slow
def test_of_several_processes_none_loads_the_model(
    target_folder: Path, features: Path, tmp_path: Path
) -> None:
    values = ["drafter.num_features=2", "drafter.num_layers=2", "drafter.block_size=3"]
    values += ["drafter.markov_rank=6", "train.steps=2", f"target.path={target_folder}"]
    values += ["train.batch_size=4", "train.anchors=6", "train.validation_share=0.3"]
    sets = [part for one in values for part in ("--set", one)]
    command = ["train", "-f", str(features), "-o", str(tmp_path / "run"), *sets]
    ended = Ranks(command, 2, tmp_path / "log", before=refuse_models).finish()
    assert [code for code, _ in ended] == [0, 0], ended
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()

"""Recipes: what is accepted, and that every mistake is one line which names the field and what to write
instead."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest
import yaml

from draftkit.config import RECIPES, Recipe, dump_recipe, load_recipe
from draftkit.errors import ConfigError
from draftkit.target.place import SMOLLM2_DRAFTER

PACKAGED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    return load_recipe(str(path), overrides)


def mistake(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_recipe_loads_by_its_name_and_carries_it(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_packaged_drafter_of_smollm2_goes_on_training_under_its_packaged_recipe() -> None:
    made = json.loads((SMOLLM2_DRAFTER / "draftkit.json").read_text("utf-8"))["recipe"]
    packaged = json.loads(json.dumps(asdict(load_recipe(made["name"]).drafter)))
    assert made["drafter"] == packaged


def test_a_name_alone_is_a_recipe_and_all_else_is_default(tmp_path: Path) -> None:
    recipe = load(tmp_path, "name: small\n")
    assert (recipe.train.lr, recipe.drafter.block_size, recipe.target.path) == (6e-4, 7, "tiny")


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(tmp_path: Path) -> None:
    text = "name: small\ntrain: {lr: 1.0e-3, epochs: 3}\n"
    recipe = load(
        tmp_path,
        text,
        "train.lr=2e-3",
        "train.lr=3e-4",
        "train.loss.tv=0",
        "evaluate.temperatures=[0.0, 0.7]",
    )
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.loss.tv) == (3e-4, 3, 0.0)
    assert recipe.evaluate.temperatures == (0.0, 0.7)


@pytest.mark.parametrize("number", ["6e-4", "6E-4", "6.0e-4", "0.0006", ".6e-3", "+6e-4"])
def test_numbers_are_read_as_in_yaml_1_2(tmp_path: Path, number: str) -> None:
    """YAML 1.1 reads 6e-4 as text, which is a well-known trap of training recipes."""
    assert load(tmp_path, f"name: small\ntrain:\n  lr: {number}\n").train.lr == pytest.approx(6e-4)


def test_a_whole_number_is_a_fine_float_and_null_a_fine_optional(tmp_path: Path) -> None:
    recipe = load(tmp_path, "name: small\ntrain: {lr: 1, steps: null}\n")
    assert recipe.train.lr == 1.0
    assert recipe.train.steps is None


def test_a_recipe_does_not_change_after_loading() -> None:
    recipe = load_recipe(PACKAGED[0])
    with pytest.raises(FrozenInstanceError):
        recipe.train.lr = 1.0  # type: ignore[misc]


def test_the_resolved_recipe_loads_to_the_same_values(tmp_path: Path) -> None:
    recipe = load_recipe(PACKAGED[0], ["train.lr=1e-5", "drafter.feature_layers=[1, 3]"])
    text = dump_recipe(recipe)
    assert load(tmp_path, text) == recipe
    assert yaml.safe_load(text)["train"]["warmup"] == 0.04  # defaults are written out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\ntrain: {lr: fast}\n", ["recipe.yaml: train.lr:", "number", "'fast'"]),
        ("name: a\ntrain: {lr: true}\n", ["train.lr:", "number", "True"]),
        ('name: a\ntrain: {epochs: "3"}\n', ["train.epochs:", "integer", "'3'"]),
        ("name: a\ntrain: {epochs: 2.5}\n", ["train.epochs:", "integer", "2.5"]),
        ("name: a\ntrain: {epochs: 0}\n", ["train.epochs:", "greater than or equal to 1", "0"]),
        ("name: a\ntrain: {lr: .nan}\n", ["train.lr:", "nan"]),
        ("name: a\ntrain: {lr: .inf}\n", ["train.lr:", "inf"]),
        ("name: a\ntrain: {loss: {decay: .inf}}\n", ["train.loss.decay:", "inf"]),
        ("name: a\ntrain: {loss: {tv: -1}}\n", ["train.loss.tv:", "greater than or equal to 0", "-1"]),
        ("name: a\ndrafter: {head: lstm}\n", ["drafter.head:", "'markov'", "'rnn'", "'lstm'"]),
        ("name: a\ntrain: 5\n", ["train:", "5"]),
        ("name: a\ntrain:\n", ["train:"]),
        ("name: a\nevaluate: {temperatures: [0.0, warm]}\n", ["evaluate.temperatures.1:", "'warm'"]),
        ("name: a\ndrafter: {feature_layers: []}\n", ["drafter.feature_layers:", "at least 1 item", "[]"]),
        (
            "name: a\ntrain: {seed: 99999999999999999999}\n",
            ["train.seed:", "less than 9223372036854775808", "9999"],
        ),
        ("name: a\ngenerate: {seed: -1}\n", ["generate.seed:", "greater than or equal to 0", "-1"]),
        ("name: 5\n", ["name:", "string", "5"]),
        ("train: {lr: 1e-3}\n", ["recipe.yaml: name:", "missing"]),
    ],
)
def test_a_wrong_value_names_field_rule_and_value(tmp_path: Path, text: str, words: list[str]) -> None:
    message = mistake(tmp_path, text)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "name: a\ntrain: {learning_rat: 1}\n",
            ["train.learning_rat:", "not a known key", "did you mean train.lr?"],
        ),
        ("name: a\ntrain: {warm_up: 0.1}\n", ["train.warm_up:", "did you mean train.warmup?"]),
        (
            "name: a\ntrain: {loss: {confidense: 1}}\n",
            ["train.loss.confidense:", "did you mean train.loss.confidence?"],
        ),
        ("name: a\ntrain: {num_epochs: 3}\n", ["did you mean train.epochs?"]),
        ("name: a\ntrain: {zzz: 3}\n", ["allowed are epochs, steps"]),
        ("name: a\nlr: 3\n", ["lr: is not a known key; did you mean train.lr?"]),
        ("name: a\ntrian: {lr: 1}\n", ["trian:", "did you mean train?"]),
        (
            "name: a\ntrain: {groups: [{parameters: fc.*, lt: 1}]}\n",
            ["train.groups.0.lt:", "allowed are parameters, lr"],
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(tmp_path: Path, text: str, words: list[str]) -> None:
    message = mistake(tmp_path, text)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\ntrain: {lr: 1\n", ["recipe.yaml", "3"]),
        ("name: a\n\ttrain: 1\n", ["recipe.yaml", "2"]),
        ("name: a\nname: b\n", ["recipe.yaml", "2", "'name'", "twice"]),
        ("name: a\ntrain:\n  lr: 1\n  epochs: 2\n  lr: 2\n", ["recipe.yaml", "5", "'lr'", "twice"]),
        ("name: a\n? [b, c]\n: 1\n", ["recipe.yaml"]),
        ("name: a\nwhen: !!python/name:os.system\n", ["recipe.yaml", "2"]),
        ("- name: a\n", ["recipe.yaml", "list", "mapping"]),
        ("", ["recipe.yaml", "mapping"]),
    ],
)
def test_broken_yaml_names_file_and_line(tmp_path: Path, text: str, words: list[str]) -> None:
    message = mistake(tmp_path, text)
    for word in words:
        assert word in message


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", ["missing", "missing.yaml", "folder/missing.yaml"])
def test_a_missing_recipe_is_answered_with_where_the_packaged_names_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name)
    assert name in str(caught.value)
    assert "draftkit recipes" in str(caught.value)


def test_a_folder_of_the_same_name_does_not_hide_a_packaged_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / PACKAGED[0]).mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(PACKAGED[0]).name == PACKAGED[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr", ["'train.lr'", "section.key=value"]),
        ("=3", ["'=3'", "section.key=value"]),
        ("name.lr=3", ["'name.lr=3'", "name", "not a section"]),
        ("train.lrr=3", ["--set train.lrr:", "did you mean train.lr?"]),
        ("train.lr=fast", ["--set train.lr:", "'fast'"]),
        ("train..lr=1", ["train.", "not a known key"]),
        ("train.lr=[1", ["train.lr=[1"]),
        ("train.lr.deep=1", ["train.lr"]),
        ("name=2026-13-01", ["'name=2026-13-01'", "month", "quotes"]),
        ("name=" + "[" * 3000, ["nested too deeply"]),
    ],
)
def test_a_wrong_override_says_what_is_wrong(tmp_path: Path, override: str, words: list[str]) -> None:
    message = mistake(tmp_path, "name: a\n", override)
    for word in words:
        assert word in message

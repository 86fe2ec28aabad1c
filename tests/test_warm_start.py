"""A drafter that starts from its target: whose weights it takes, and when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftkit import stages
from draftkit.config import load_recipe
from draftkit.draft.warm_start import spread_start_layers
from draftkit.errors import ConfigError
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import load_target

SIZES = ["drafter.num_features=2", "drafter.num_layers=2", "drafter.start=target", "drafter.intermediate_size=null"]


def started(folder: Path, *changes: str) -> tuple[object, object]:
    recipe = load_recipe("tiny-dspark", [f"target.path={folder}", *SIZES, *changes])
    target = load_target(str(folder))
    return target, stages.new_drafter_for(recipe, target, load_tokenizer(str(folder)))


@pytest.mark.parametrize(("change", "layers"), [((), (0, 3)), (("drafter.start_layers=[1,2]",), (1, 2))])
def test_layers_and_final_norm_are_copies_of_the_targets(
    target_folder: Path, change: tuple[str, ...], layers: tuple[int, ...]
) -> None:
    target, drafter = started(target_folder, *change)
    for own, index in zip(drafter.layers, layers, strict=True):  # type: ignore[attr-defined]
        source = target.layers[index]  # type: ignore[attr-defined]
        for name, weight in source.state_dict().items():
            assert torch.equal(own.state_dict()[name], weight)
    assert torch.equal(drafter.norm.weight, target.final_norm().weight)  # type: ignore[attr-defined]
    hidden = drafter.config.hidden_size  # type: ignore[attr-defined]
    passed = drafter.fc.weight[:, -hidden:].diagonal()  # type: ignore[attr-defined]
    assert (passed - 1).abs().max() < 0.1, "the deepest feature passes through"
    drafter.layers[0].mlp.gate_proj.weight.data.zero_()  # type: ignore[attr-defined]
    assert target.layers[layers[0]].mlp.gate_proj.weight.abs().max() > 0, "copies, not the target's own"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("drafter.intermediate_size=64", "do not fit"),
        ("drafter.num_layers=9", "a target of 4"),
        ("drafter.start_layers=[3]", r"start_layers: \[3\] does not fit, give 2, one per drafter layer, from 0 to 3"),
        ("drafter.start_layers=[0,4]", "does not fit"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(target_folder: Path, change: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        started(target_folder, change)


def test_an_eagle_drafter_begins_at_random(target_folder: Path) -> None:
    with pytest.raises(ConfigError, match="begins at random"):
        started(target_folder, "drafter.algorithm=eagle3", "drafter.num_layers=1")


def test_layers_are_spread_from_the_first_to_the_last() -> None:
    assert [spread_start_layers(depth, 14) for depth in (1, 2, 3, 5)] == [(13,), (0, 13), (0, 6, 13), (0, 3, 6, 10, 13)]


def test_layers_to_start_from_need_a_start_from_the_target() -> None:
    with pytest.raises(ConfigError, match=r"drafter: .*start_layers: needs start: target"):
        load_recipe("tiny-dspark", ["drafter.start_layers=[0,1]"])

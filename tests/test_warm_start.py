"""A drafter that starts from its target: whose weights it takes, and when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftkit import feature_stages, train_stages
from draftkit.config import load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.draft.block import BlockDrafter
from draftkit.draft.warm_start import spread_start_layers
from draftkit.errors import ConfigError
from draftkit.features.store import FeatureStore
from draftkit.target.loading import load_target
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from support.targets import make_target_folder

SIZES = [
    "drafter.num_features=2",
    "drafter.num_layers=2",
    "drafter.start=target",
    "drafter.intermediate_size=null",
]


def started(folder: Path, *changes: str) -> tuple[object, object]:
    recipe = load_recipe("tiny-dspark", [f"target.path={folder}", *SIZES, *changes])
    target = load_target(str(folder))
    return target, train_stages.new_drafter_for(recipe, target, load_tokenizer(str(folder)))


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
        (
            "drafter.start_layers=[3]",
            r"start_layers: \[3\] does not fit, give 2, one per drafter layer, from 0 to 3",
        ),
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
    assert [spread_start_layers(depth, 14) for depth in (1, 2, 3, 5)] == [
        (13,),
        (0, 13),
        (0, 6, 13),
        (0, 3, 6, 10, 13),
    ]


def test_layers_to_start_from_need_a_start_from_the_target() -> None:
    with pytest.raises(ConfigError, match=r"drafter: .*start_layers: needs start: target"):
        load_recipe("tiny-dspark", ["drafter.start_layers=[0,1]"])


def llama_started(
    folder: Path, *changes: str, with_store: bool = True
) -> tuple[TransformersTarget, BlockDrafter, FeatureStore]:
    """A drafter of the Qwen3 block in front of a Llama target, whose queries and keys have no norms to
    copy."""
    target_folder = make_target_folder(folder / "llama", family="llama")
    target, tokenizer = load_target(str(target_folder)), load_tokenizer(str(target_folder))
    recipe = load_recipe("tiny-dspark", [f"target.path={target_folder}", *SIZES, *changes])
    talk = [
        Message("user", "What is a list?"),
        Message("assistant", "A list holds values. Step 1: 3 + 4 = 7."),
    ]
    feature_stages.run_capture(
        target, tokenizer, recipe, [Conversation("a", "chat", tuple(talk))], folder / "features"
    )
    store = FeatureStore(folder / "features")
    drafter = train_stages.new_drafter_for(recipe, target, tokenizer, store if with_store else None)
    assert isinstance(drafter, BlockDrafter)
    return target, drafter, store


def test_norms_that_the_target_lacks_are_the_least_squares_fit_to_its_text(tmp_path: Path) -> None:
    target, drafter, store = llama_started(
        tmp_path, "drafter.start_layers=[0,2]", "drafter.feature_layers=[0,1]"
    )
    sample = store[0]
    known = slice(0, sample.context)
    # the inputs of layers 0 and 2
    streams = [drafter.embed_tokens(sample.tokens_T[known]), sample.features_TF[known, 32:].float()]
    for own, index, stream_TH in zip(drafter.draft_layers(), (0, 2), streams, strict=True):
        source = target.layers[index]
        assert torch.equal(own.self_attn.q_proj.weight, source.self_attn.q_proj.weight)
        for norm, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
            wanted = (
                getattr(source.self_attn, projection)(source.input_layernorm(stream_TH))
                .reshape(-1, 8)
                .detach()
            )
            unit = wanted / wanted.square().mean(-1, keepdim=True).add(1e-6).sqrt()
            fitted = [
                torch.linalg.lstsq(unit[:, d : d + 1], wanted[:, d : d + 1]).solution.item() for d in range(8)
            ]
            assert torch.allclose(
                getattr(own.self_attn, norm).weight, torch.tensor(fitted), rtol=1e-3, atol=1e-4
            )


def test_norms_cannot_be_fitted_without_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no query and key norms; they are fitted to a feature store"):
        llama_started(tmp_path, with_store=False)


def test_a_llama_block_is_a_plain_copy(tmp_path: Path) -> None:
    target, drafter, _ = llama_started(tmp_path, "drafter.style=llama", with_store=False)
    for own, index in zip(drafter.draft_layers(), (0, 3), strict=True):
        for name, weight in target.layers[index].state_dict().items():
            assert torch.equal(own.state_dict()[name], weight)

"""Hidden states as speculators stores them, written here by `datasets` and safetensors: they train as a store
of the same features does; of something else they are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from hs_connectors.fp8_utils import SCALES_KEY, quantize_tensor_to_fp8
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from draftkit import feature_stages, stages, train_stages
from draftkit.cli import app
from draftkit.config import Recipe
from draftkit.data.messages import Conversation
from draftkit.errors import ConfigError, FeatureStoreError
from draftkit.features.source import FeatureSource
from draftkit.features.store import FeatureStore
from draftkit.target.transformers import TransformersTarget
from support.hidden_states_server import states_of
from support.training import conversations, losses, recipe_for

IDS = [1, 3, 4]  # of layers 0 and 2, and of the last one of 4


@pytest.fixture(scope="module")
def recipe(target_folder: Path) -> Recipe:
    changed = recipe_for(target_folder).model_dump()
    changed["drafter"]["feature_layers"], changed["capture"]["dtype"] = [0, 2], "float32"
    return Recipe.model_validate(changed)


@pytest.fixture(scope="module")
def opened(recipe: Recipe) -> tuple[TransformersTarget, Any]:
    target, tokenizer = stages.open_target(recipe)
    assert isinstance(target, TransformersTarget)
    return target, tokenizer


@pytest.fixture(scope="module")
def store(opened: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Of one domain, as a data set is."""
    folder = tmp_path_factory.mktemp("store")
    read = [Conversation(c.id, "all", c.messages) for c in conversations()]
    feature_stages.run_capture(*opened, recipe, read, folder)
    return FeatureStore(folder)


@pytest.fixture(scope="module")
def written(opened: Any, store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts of the store, and the hidden states that the target has of them."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [store.text(i) for i in range(len(store))]
    rows = {
        "input_ids": [tokens.tolist() for tokens, _ in texts],
        "loss_mask": [mask.int().tolist() for _, mask in texts],
        "seq_len": [len(tokens) for tokens, _ in texts],
    }
    datasets.Dataset.from_dict(rows).with_format("torch").save_to_disk(str(folder))
    (folder / "hidden_states").mkdir()
    for number, tokens in enumerate(rows["input_ids"]):
        states = {"hidden_states": states_of(opened[0], tokens, IDS), "token_ids": torch.tensor(tokens)}
        save_file(states, folder / f"hidden_states/hs_{number}.safetensors")
    return folder


@pytest.fixture
def prepared(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "prepared"))


def test_stored_states_train_as_a_store_of_the_same_features(
    opened: Any, recipe: Recipe, store: FeatureStore, written: Path, tmp_path: Path
) -> None:
    source = feature_stages.open_features(recipe, *opened, [written])
    assert source.lengths().tolist() == store.lengths().tolist()
    for one, other in zip(source.read(range(len(source))), store, strict=True):  # type: ignore[call-overload]
        assert torch.equal(one.tokens_T, other.tokens_T) and torch.equal(one.loss_mask_T, other.loss_mask_T)
        before, place = one.context, one.loss_mask_T[1:].nonzero().squeeze(-1)
        torch.testing.assert_close(one.features_TF[:before], other.features_TF[:before])
        torch.testing.assert_close(one.last_hidden_TH[place], other.last_hidden_TH[place])
        assert one.last_hidden_TH[place].abs().sum() > 0

    def run(source: FeatureSource, out: Path) -> list[float]:
        train_stages.run_train(*opened, recipe, source, out)
        return losses(out)

    wanted = run(store, tmp_path / "store_run")
    assert run(source, tmp_path / "states_run") == pytest.approx(wanted, abs=1e-5)
    assert len(wanted) == 12


def test_eight_bits_are_read_by_hs_connectors(
    opened: Any, recipe: Recipe, store: FeatureStore, prepared: Path
) -> None:
    for path in (prepared / "hidden_states").iterdir():
        states = load_file(path)
        states["hidden_states"], states[SCALES_KEY] = quantize_tensor_to_fp8(states["hidden_states"])
        save_file(states, path)
    source = feature_stages.open_features(recipe, *opened, [prepared])
    one, other = source.read([3])[0], store[3]
    assert one.features_TF.dtype == one.last_hidden_TH.dtype == torch.bfloat16
    close = {"atol": 0.5, "rtol": 0.1}
    torch.testing.assert_close(
        one.features_TF[: one.context].float(), other.features_TF[: one.context], **close
    )
    with pytest.raises(FeatureStoreError, match="joined must hold the same"):
        feature_stages.open_features(recipe, *opened, [prepared, store.folder])


def test_they_are_joined_with_a_store_and_trained_on_by_the_command(
    opened: Any, recipe: Recipe, store: FeatureStore, prepared: Path, tmp_path: Path
) -> None:
    joined = feature_stages.open_features(recipe, *opened, [f"{prepared}=0.5", store.folder])
    assert [s.id for s in joined.read([0, len(store)])] == [f"{prepared}#0", store[0].id]
    sets = [f"target.path={recipe.target.path}", "drafter.feature_layers=[0,2]", "train.steps=2"]
    sets += ["drafter.num_layers=1", "train.decode_prompts=0", "train.batch_size=2"]
    words = [
        "train",
        "-f",
        str(prepared),
        "-o",
        str(tmp_path / "out"),
        *(w for s in sets for w in ("--set", s)),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len(losses(tmp_path / "out")) == 2


def states(index: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A sample's tensors changed."""

    def fault(folder: Path) -> None:
        path = folder / f"hidden_states/hs_{index}.safetensors"
        found = load_file(path)
        change(found)
        save_file({name: value.contiguous() for name, value in found.items()}, path)

    return fault


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """The hidden states of all samples changed."""

    def fault(folder: Path) -> None:
        for path in (folder / "hidden_states").iterdir():
            found = load_file(path)
            save_file(found | {"hidden_states": change(found["hidden_states"]).contiguous()}, path)

    return fault


def rows(**columns: Any) -> Callable[[Path], None]:
    """Another data set; None leaves a column out."""

    def fault(folder: Path) -> None:
        there = datasets.load_from_disk(str(folder)).with_format(None).to_dict()
        kept = {name: value for name, value in (there | columns).items() if value is not None}
        other = datasets.Dataset.from_dict({n: v(there[n]) if callable(v) else v for n, v in kept.items()})
        for path in folder.glob("*.*"):
            path.unlink()
        other.save_to_disk(str(folder))

    return fault


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut(pattern: str) -> Callable[[Path], None]:
    """The end of a file torn off."""

    def fault(folder: Path) -> None:
        [path] = folder.glob(pattern)
        path.write_bytes(path.read_bytes()[:-40])

    return fault


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda found: found.update({name: value})


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (
        without("hidden_states/hs_2.safetensors", "hidden_states/hs_5.safetensors"),
        r"lacks 2 of 14 files, hs_2",
    ),
    (lambda folder: shutil.rmtree(folder / "hidden_states"), r"lacks 14 of 14 files"),
    (cut("hidden_states/hs_4.safetensors"), r"hs_4.safetensors: SafetensorError.*run speculators'"),
    (cut("data-*.arrow"), r"is no data set with input_ids and loss_mask"),
    (rows(loss_mask=None), r"is no data set with input_ids and loss_mask"),
    (rows(loss_mask=lambda v: [v[0][:-1], *v[1:]]), r"sample 0 lacks ids or a mask of them"),
    (rows(loss_mask=lambda v: [1] * len(v)), r"sample 0 lacks ids or a mask of them"),
    (rows(input_ids=lambda v: [[10**6, *v[0][1:]], *v[1:]]), r"sample 0 has token 1000000, .* has \d+"),
    (rows(input_ids=lambda v: [[-1, *v[0][1:]], *v[1:]]), r"sample 0 has token -1"),
    (rows(input_ids=lambda v: ["text"] * len(v)), r"its input_ids are no lists"),
    (rows(input_ids=lambda v: [[], *v[1:]]), r"has no samples, or empty ones"),
    (
        rows(input_ids=lambda v: [v[1], v[0], *v[2:]], loss_mask=lambda v: [v[1], v[0], *v[2:]]),
        r"of other tokens",
    ),
    (every(lambda s: s[:, 1:]), r"gives \[\d+, 2, 32\] numbers \(float32\) where \[\d+, 3, 32\] are wanted"),
    (every(lambda s: s[..., :16]), r"gives \[\d+, 3, 16\] numbers .*its layer ids must be \[1, 3, 4\]"),
    (states(3, lambda found: found.pop("token_ids")), r"hs_3.safetensors: .*gives hidden_states, no hidden"),
    (states(3, lambda found: found["hidden_states"].fill_(torch.inf)), r"numbers that are not finite"),
    (states(3, put("hidden_states", torch.ones(4, 3, 32, dtype=torch.int64))), r"numbers \(int64\)"),
    (every(lambda s: s[:, [1, 0, 2]]), r"gives the output of layer 2 where the output of layer 0 is wanted"),
    (every(lambda s: s.flip(0)), r"gives another model's where the output of layer 0 is wanted"),
    (every(lambda s: s[:, [0, 1, 1]]), r"its last hidden state is not the target's; store layer ids"),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS, ids=[told[:24] for _, told in FAULTS])
def test_a_folder_of_something_else_is_refused_by_name(
    fault: Callable[[Path], None], told: str, opened: Any, recipe: Recipe, prepared: Path
) -> None:
    fault(prepared)
    with pytest.raises(FeatureStoreError, match=told) as refused:
        feature_stages.open_features(recipe, *opened, [prepared])
    assert "\n" not in str(refused.value)


def test_without_a_probe_the_target_is_not_asked(opened: Any, recipe: Recipe, prepared: Path) -> None:
    every(lambda s: s[:, [1, 0, 2]])(prepared)
    assert len(feature_stages.open_features(recipe, *opened, [prepared], probe=False)) == 14


def test_several_folders_are_probed_by_a_target_that_is_opened_once(
    opened: Any, recipe: Recipe, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[Recipe] = []
    original = feature_stages.open_target

    def noted(given: Recipe) -> Any:
        times.append(given)
        return original(given)

    monkeypatch.setattr(feature_stages, "open_target", noted)
    files, tokenizer = stages.read_target(recipe)
    folders = [Path(shutil.copytree(written, tmp_path / name)) for name in ("one", "two")]
    assert len(feature_stages.open_features(recipe, files, tokenizer, folders)) == 28
    assert len(times) == 1
    every(lambda s: s[:, [1, 0, 2]])(folders[1])
    with pytest.raises(FeatureStoreError, match=r"two: hs_\d+.*gives the output of layer 2"):
        feature_stages.open_features(recipe, files, tokenizer, folders)


def test_a_family_of_several_streams_is_refused(opened: Any, recipe: Recipe, prepared: Path) -> None:
    info = replace(opened[0].info, family="deepseek_v4")
    with pytest.raises(
        ConfigError, match=r"no last hidden state of deepseek_v4 can be made .* capture a store"
    ):
        feature_stages.open_features(recipe, SimpleNamespace(info=info), None, [prepared])  # type: ignore[arg-type]


def test_nothing_is_captured_into_a_data_set(opened: Any, recipe: Recipe, prepared: Path) -> None:
    before = sorted(path.name for path in prepared.iterdir())
    with pytest.raises(FeatureStoreError, match="holds a data set of Hugging Face; choose another folder"):
        feature_stages.run_capture(*opened, recipe, conversations(), prepared)
    assert sorted(path.name for path in prepared.iterdir()) == before

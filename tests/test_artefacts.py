"""Artefacts vouch for themselves: whatever is edited in one, with a value that could be, is found and the
file is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftkit.artefact import DIGEST, digest_of, is_intact, is_plain_name, read_json, sealed
from draftkit.draft.checkpoint import load_drafter, new_drafter, save_drafter
from draftkit.errors import CheckpointError, ConfigError, DataError, DraftkitError, FeatureStoreError
from draftkit.features.manifest import begin_store, read_manifest
from draftkit.output import one_writer, only_writer
from draftkit.schedule.calibration import Calibration, load_calibration, save_calibration
from draftkit.schedule.step_rate_table import StepRateTable, load_step_rate, save_step_rate
from draftkit.target.transformers import TransformersTarget
from draftkit.train.folder import read_folder, write_folder
from draftkit.train.state import Position
from support.drafters import BLOCK_CONFIG
from support.stores import made_manifest


def store(folder: Path) -> Path:
    begin_store(folder, made_manifest())
    return folder / "manifest.json"


def state(folder: Path) -> Path:
    write_folder(folder / "state", {"model.w": torch.ones(3)}, asdict(Position(5, 1.5, 2.5, 1, 0, "f")))
    return folder / "state" / "position.json"


def calibration(folder: Path) -> Path:
    save_calibration(
        Calibration((1.0, 0.5), "d", "10 prompts", 10, (0.1, 0.2), (0.01, 0.02)), folder / "calibration.json"
    )
    return folder / "calibration.json"


def step_rate(folder: Path) -> Path:
    save_step_rate(
        StepRateTable((0, 64), (1, 8), ((0.1, 0.2), (0.2, 0.3)), (1, 4), (0.01, 0.02)),
        folder / "step_rate.json",
    )
    return folder / "step_rate.json"


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "store": (store, lambda path: read_manifest(path.parent)),
    "state": (state, lambda path: read_folder(path.parent)),
    "calibration": (calibration, lambda path: load_calibration(path, 2, "d")),
    "step rate": (step_rate, load_step_rate),
}


def edits(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Every place in a JSON value with something else that it could be."""
    if isinstance(value, dict):
        return [edit for name, one in value.items() for edit in edits(one, (*at, name))]
    if isinstance(value, list):
        return [edit for place, one in enumerate(value) for edit in edits(one, (*at, place))]
    if isinstance(value, bool):
        return [(at, not value)]
    if isinstance(value, int | float):
        return [(at, value + 1)]
    return [(at, value + "x")] if isinstance(value, str) else []


def put(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(content))
    place = changed
    for step in at[:-1]:
        place = place[step]
    place[at[-1]] = value
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_a_note_is_covered(tmp_path: Path, kind: str) -> None:
    make, read = KINDS[kind]
    path = make(tmp_path)
    read(path)
    content = json.loads(path.read_text())
    tried = edits(content)
    assert len(tried) > 5
    for at, value in tried:
        path.write_text(json.dumps(put(content, at, value)))
        with pytest.raises(DraftkitError) as caught:
            read(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value), at
    renamed = {"digesu" if name == "digest" else name: value for name, value in content.items()}
    path.write_text(json.dumps(renamed))
    with pytest.raises(DraftkitError, match=re.escape(path.name)):
        read(path)
    path.write_text(json.dumps(dict(reversed(content.items()))))  # the order of fields is nobody's business
    read(path)


WRONG: list[tuple[tuple[Any, ...], Any]] = [
    (("dtype",), "float8"),
    (("dtype",), None),
    (("feature_layers",), None),
    (("feature_layers",), 5),
]


@pytest.mark.parametrize(("at", "value"), WRONG, ids=str)
def test_a_manifest_that_was_sealed_with_nonsense_is_one_line(
    tmp_path: Path, at: tuple[Any, ...], value: Any
) -> None:
    path = store(tmp_path)
    path.write_text(json.dumps(sealed(put(json.loads(path.read_text()), at, value))))
    with pytest.raises(FeatureStoreError, match=r"manifest\.json: is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["{" * 100_000, '{"a":' * 50_000, '{"a": ' + "9" * 5000 + "}", "[1, 2", '"\ud800"', "", "nul"]
)
def test_json_that_python_cannot_hold_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "note.json"
    path.write_text(text, errors="surrogatepass")
    with pytest.raises(DataError, match=r"note\.json: is damaged") as caught:
        read_json(path, DataError)
    assert len(str(caught.value)) < 400
    with pytest.raises(DataError, match="regular file"):
        read_json(tmp_path, DataError)
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path / "none", DataError)


def test_a_digest_is_of_what_is_said_and_not_of_how() -> None:
    note = sealed({"b": 1, "a": [1.5, "é", None]})
    assert is_intact(json.loads(json.dumps(note, indent=3))) and note[DIGEST] == digest_of(note)
    assert not is_intact({"b": 1}) and not is_intact(note | {"b": 1.0})
    assert [is_plain_name(n) for n in ("a.b", "..", "", "a/b", "/a", "a\0", None, 5)] == [True, *[False] * 7]


@pytest.fixture
def drafter(target: TransformersTarget, tmp_path: Path) -> Path:
    config = replace(BLOCK_CONFIG, hidden_size=32, vocab_size=target.info.vocab_size, num_target_layers=4)
    made = new_drafter(config, target.embedding_weight(), target.head_weight())
    save_drafter(made, tmp_path / "drafter", {"target": "x", "sha256": "of another"}, torch.float32)
    load_drafter(tmp_path / "drafter")
    return tmp_path / "drafter"


@pytest.mark.parametrize("name", ["config.json", "draftkit.json"])
def test_every_value_beside_a_drafters_weights_is_covered(drafter: Path, name: str) -> None:
    path = drafter / name
    content = json.loads(path.read_text())
    for at, value in edits(content):
        path.write_text(json.dumps(put(content, at, value)))
        with pytest.raises(CheckpointError, match=str(drafter)):
            load_drafter(drafter)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"hidden_size": 10**5},
        {"hidden_size": 10**400},
        {"num_hidden_layers": 10**6},
        {"vocab_size": 10**12},
        {"markov_rank": -1},
        {"markov_rank": 10**12},
        {"rope_theta": -1.0},
        {"rope_theta": 10**400},
        {"rms_norm_eps": float("nan")},
        {"max_position_embeddings": -5},
        {"num_target_layers": 10**9},
        {"head_dim": 0},
    ],
    ids=str,
)
def test_a_size_that_cannot_be_is_one_line_before_memory_is_used(
    drafter: Path, changes: dict[str, Any]
) -> None:
    (drafter / "draftkit.json").unlink()
    content = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(CheckpointError, match=str(drafter)) as caught:
        load_drafter(drafter)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused(drafter: Path) -> None:
    (drafter / "draftkit.json").unlink()
    tensors = load_file(drafter / "model.safetensors")
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, drafter / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds numbers that are not finite"):
        load_drafter(drafter)


@pytest.mark.parametrize("place", [5, None, ["a"], "../model.safetensors", "/dev/zero", ".", ""], ids=str)
def test_an_index_names_files_of_its_folder(drafter: Path, place: Any) -> None:
    (drafter / "model.safetensors").unlink()
    (drafter / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(CheckpointError, match="not in the folder"):
        load_drafter(drafter)


# --- one writer


def test_a_second_writer_is_told_and_the_first_goes_on(tmp_path: Path) -> None:
    @one_writer()
    def stage(out: Path) -> str:
        with pytest.raises(DataError, match="another run is writing it"), only_writer(out):
            pass
        return "done"

    assert stage(tmp_path / "new" / "folder") == "done"
    assert stage(tmp_path / "new" / "folder") == "done"


def test_a_place_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    @one_writer()
    def stage(out: Path) -> None:
        raise AssertionError("must not begin")

    with pytest.raises((OSError, ConfigError), match="file") as caught:
        stage(tmp_path / "file" / "folder")
    assert "choose another" in str(caught.value)

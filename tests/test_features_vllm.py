"""Features from a server that speaks vLLM's `extract_hidden_states`: the same store and losses as from the
target itself, and refusals by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import hs_connectors.transfer
import pytest
import torch
from typer.testing import CliRunner

from draftkit import feature_stages, stages, train_stages
from draftkit.cli import app
from draftkit.config import Recipe, load_recipe
from draftkit.errors import ConfigError, ServeError
from draftkit.features.store import FeatureStore
from draftkit.target.transformers import TransformersTarget
from support.hidden_states_server import hidden_states_server

WORDS = "list value holds step return what add number the a of is".split()
IDS = [1, 3, 4]  # of layers 0 and 2, and of the last one of 4


@pytest.fixture(scope="module")
def target(target_folder: Path) -> TransformersTarget:
    return stages.open_target(recipe_of(target_folder))[0]


def recipe_of(target_folder: Path, *changed: str) -> Recipe:
    sets = [f"target.path={target_folder}", "drafter.feature_layers=[0,2]", "drafter.num_layers=1"]
    sets += ["drafter.block_size=4", "drafter.markov_rank=6", "train.steps=50", "train.batch_size=4"]
    sets += ["train.decode_prompts=0", "train.validation_share=0.2", "capture.dtype=float32"]
    return load_recipe("tiny-dspark", [*sets, *changed])


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("talk") / "talk.jsonl"
    with path.open("w") as file:
        for i in range(20):
            said = [("user", 4), ("assistant", rng.randrange(4, 20))]
            messages = [{"role": r, "content": " ".join(rng.choices(WORDS, k=k))} for r, k in said]
            file.write(json.dumps({"id": f"c{i}", "messages": messages}) + "\n")
    return path


def words(recipe_from: Path, talk: Path, out: Path, url: str, *more: str) -> list[str]:
    sets = ["drafter.feature_layers=[0,2]", "capture.dtype=float32", f"target.path={recipe_from}"]
    chosen = [w for value in sets for w in ("--set", value)]
    return ["capture", "-c", str(talk), "-o", str(out), "--from", f"vllm={url}", *chosen, *more]


@pytest.mark.parametrize("fp8", [False, True])
def test_a_store_from_a_server_is_that_of_the_target(
    fp8: bool, target: TransformersTarget, target_folder: Path, talk: Path, tmp_path: Path
) -> None:
    tokenizer = stages.read_target(recipe_of(target_folder))[1]
    recipe = recipe_of(target_folder, "capture.max_length=24")
    read = stages.read_prompts([talk])
    feature_stages.run_capture(target, tokenizer, recipe, read, tmp_path / "own")
    (tmp_path / "shared").mkdir()
    with hidden_states_server(target, IDS, tmp_path / "shared", fp8) as url:
        more = ("--set", "capture.max_length=24", *(["--no-probe"] if fp8 else []))
        done = CliRunner().invoke(app, words(target_folder, talk, tmp_path / "theirs", url, *more))
    assert done.exit_code == 0, done.output
    assert not list((tmp_path / "shared").iterdir()), "files are taken away"
    own, theirs = FeatureStore(tmp_path / "own"), FeatureStore(tmp_path / "theirs")
    assert len(own) == len(theirs) > 20, "in windows"
    for one, other in zip(own, theirs, strict=True):  # type: ignore[call-overload]
        assert one.id == other.id and torch.equal(one.tokens_T, other.tokens_T)
        close = {"atol": 0.5, "rtol": 0.1} if fp8 else {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(other.features_TF, one.features_TF, **close)
        torch.testing.assert_close(other.last_hidden_TH, one.last_hidden_TH, **close)


@pytest.mark.slow
def test_live_from_a_server_has_the_losses_of_the_target(
    target: TransformersTarget, target_folder: Path, talk: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(target_folder)
    files, tokenizer = stages.read_target(recipe)
    read = stages.read_prompts([talk])

    def losses(source: Any, name: str) -> list[float]:
        train_stages.run_train(files, tokenizer, recipe, source, tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    own = feature_stages.live_features(target, tokenizer, recipe, read, tmp_path / "own")
    wanted = losses(own, "own")
    (tmp_path / "shared").mkdir()
    with hidden_states_server(target, IDS, tmp_path / "shared") as url:
        reader = feature_stages.server_reader(recipe, files, url, probe=True)
        theirs = feature_stages.live_features_by(
            files, reader, True, tokenizer, recipe, read, tmp_path / "theirs"
        )
        assert losses(theirs, "theirs") == pytest.approx(wanted, abs=1e-3)
    assert len(wanted) == 50


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([2, 3, 4], r"gives the output of layer 1 where the output of layer 0 is wanted; .*\[1, 3, 4\]"),
        ([0, 2, 4], r"gives another model's where the output of layer 0 is wanted"),
        ([1, 3, 3], r"its last hidden state is not the target's"),
        ([1, 4], r"gives \[24, 2, 32\] numbers \(float32\) where \[24, 3, 32\] are wanted"),
    ],
)
def test_other_layers_are_refused(
    ids: list[int], told: str, target: TransformersTarget, target_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(target_folder)
    files, _ = stages.read_target(recipe)
    with hidden_states_server(target, ids, tmp_path) as url, pytest.raises(ServeError, match=told):
        feature_stages.server_reader(recipe, files, url, probe=True)


def test_a_server_that_extracts_nothing_or_is_not_there_is_one_line(
    target: TransformersTarget, target_folder: Path, talk: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(target_folder)
    files, _ = stages.read_target(recipe)
    nothing = pytest.raises(ServeError, match="extracts no hidden states; start it with the method")
    with hidden_states_server(target, IDS, tmp_path, extracts=False) as url, nothing:
        feature_stages.server_reader(recipe, files, url, probe=True)
    with pytest.raises(ServeError, match=r"/v1/models fails \(.*\); start it"):
        feature_stages.server_reader(recipe, files, url, probe=True)
    for wrong in ("sglang=http://x", "vllm=host:80", "http://x"):
        done = CliRunner().invoke(app, [*words(target_folder, talk, tmp_path, url), "--from", wrong])
        assert isinstance(done.exception, ConfigError) and "give vllm=http" in str(done.exception)


def test_another_version_of_the_connectors_is_refused(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftkit.features.vllm.version", lambda name: "0.10.1")
    recipe = recipe_of(target_folder)
    with pytest.raises(
        ConfigError, match=r"hs-connectors 0\.10\.1 is installed, this draftkit knows 0\.9\.x"
    ):
        feature_stages.server_reader(recipe, stages.read_target(recipe)[0], "http://127.0.0.1:1", probe=True)


def test_a_file_that_comes_late_is_waited_for(
    target: TransformersTarget, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM writes a request's file in its next step, which a busy server takes longer for than hs-connectors
    waits."""
    waits: list[str] = []

    def wait(lock_path: str) -> None:
        waits.append(lock_path)
        if len(waits) < 3:
            raise TimeoutError("Timed out waiting for lock")
        wait_for_lock(lock_path)

    wait_for_lock = hs_connectors.transfer.wait_for_lock
    monkeypatch.setattr(hs_connectors.transfer, "wait_for_lock", wait)
    recipe = recipe_of(target_folder)
    files, _ = stages.read_target(recipe)
    with hidden_states_server(target, IDS, tmp_path) as url:
        feature_stages.server_reader(recipe, files, url, probe=True)
    assert len(waits) >= 3, "more where the server takes more than the ten seconds of hs-connectors"

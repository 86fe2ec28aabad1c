"""From logs to a drafter with a table of before and after, and training that goes on from a finished
drafter."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from draftkit import feature_stages, stages, train_stages
from draftkit.config import Recipe, load_recipe
from draftkit.draft.checkpoint_files import read_provenance
from draftkit.errors import CheckpointError, ConfigError, DataError
from draftkit.features.store import FeatureStore
from draftkit.specialise import print_specialised, recipe_for, run_specialise
from draftkit.target.loading import load_target
from support.targets import make_target_folder

SMALL = (
    *(
        "generate.max_new_tokens=12",
        "generate.batch_size=8",
        "drafter.num_layers=1",
        "drafter.num_features=2",
    ),
    *(
        "drafter.markov_rank=4",
        "drafter.intermediate_size=32",
        "train.steps=4",
        "train.batch_size=4",
        "train.anchors=4",
    ),
    *(
        "train.decode_prompts=0",
        "train.validation_share=0.1",
        "evaluate.max_new_tokens=8",
        "evaluate.prompts_per_domain=6",
    ),
    *("evaluate.temperatures=[0.0]", "evaluate.speed_prompts=2"),
)


def recipe_of(folder: Path, *more: str) -> Recipe:
    return load_recipe("tiny-dspark", [f"target.path={folder}", *SMALL, *more])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests of an agent: every conversation three times, each time longer."""
    path = tmp_path_factory.mktemp("log") / "requests.jsonl"
    rows: list[dict[str, Any]] = []
    for number in range(60):
        messages: list[dict[str, Any]] = []
        for turn in range(3):
            messages = [*messages, {"role": "user", "content": f"what is {number} in turn {turn}?"}]
            answer = {
                "role": "assistant",
                "content": "```\nreturn a\n```" if number % 2 else f"a list holds {turn}",
            }
            rows.append({"request": {"messages": messages}, "response": {"choices": [{"message": answer}]}})
            messages = [*messages, answer]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def first(target_folder: Path, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a drafter to start from, on the target's own answers."""
    out = tmp_path_factory.mktemp("first")
    found = run_specialise(recipe_of(target_folder), [log], out, regenerate=True, say=lambda line: None)
    assert not found.before and {row["domain"] for row in found.rows()} == {"code", "prose", "macro"}
    return out


def test_a_drafter_goes_on_and_the_table_has_both_sides(
    first: Path, target_folder: Path, log: Path, tmp_path: Path
) -> None:
    start, told = first / "drafter" / "best", list[str]()
    found = run_specialise(recipe_for(None, [], start, tmp_path), [log], tmp_path, start, say=told.append)
    rows = json.loads((tmp_path / "specialised.json").read_text())["rows"]
    assert rows == json.loads(json.dumps(found.rows()))
    for row in rows:
        assert row["before"]["low"] <= row["before"]["value"] <= row["before"]["high"]
        assert row["after"]["value"] >= 1 and row["prompts"] > 0
        assert row["speed_before"] > 0 and row["speed_after"] > 0, row["domain"]
    printed = io.StringIO()
    print_specialised(found, Console(file=printed, width=80))
    assert "\u2026" not in printed.getvalue(), "whole intervals, in 80 columns"
    assert told[0].startswith("read 180 rows") and told[1].startswith("dropped 0 repeated, 120 beginnings")
    assert read_provenance(tmp_path / "drafter" / "best")["started_from"]
    again = run_specialise(recipe_for(None, [], start, tmp_path), [log], tmp_path, start, say=told.append)
    assert again.rows() == found.rows(), "the same command again finds everything done"


def test_step_zero_is_the_drafters_own_quality(first: Path, target_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(target_folder, "train.steps=1", "train.lr=1e-9")
    target, tokenizer = stages.open_target(recipe)
    start = first / "drafter" / "best"
    source = feature_stages.open_features(recipe, target, tokenizer, [first / "features"])
    train_stages.run_train(target, tokenizer, recipe, source, tmp_path, start_from=start)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    own = read_provenance(start)["validation"]
    assert lines[0]["step"] == 0
    for name, value in own.items():
        assert lines[0]["validation"][name] == pytest.approx(value, rel=0.02), (
            "bfloat16 of the saved weights apart"
        )


def test_another_shape_target_or_switches_are_refused_by_name(
    first: Path, target_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    start = first / "drafter" / "best"
    target, tokenizer = stages.open_target(recipe_of(target_folder))
    store = FeatureStore(first / "features")
    for change, message in (
        ("drafter.block_size=4", "block_size is 7, the recipe has 4"),
        ("drafter.feature_layers=[0, 1]", r"feature_layers is \[\d, \d\], the recipe has \[0, 1\]"),
        ("drafter.head=none", "head is markov, the recipe has none"),
        ("drafter.algorithm=eagle3", "is of another algorithm than the recipe's eagle3"),
        ("target.template_switches={message: 1}", r"was trained with template switches \{\}, the recipe has"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_stages.drafter_to_continue(
                recipe_of(target_folder, change), target, tokenizer, store, start
            )
    free = max(
        set(range(target.info.vocab_size))
        - {i for s in range(len(store)) for i in store[s].tokens_T.tolist()}
    )
    own = train_stages.drafter_config(recipe_of(target_folder), target, tokenizer, store)
    if free != getattr(own, "mask_token_id", None):
        changed = recipe_of(target_folder, f"drafter.mask_token_id={free}")
        with pytest.raises(ConfigError, match=f"mask_token_id is .*, the recipe has {free}"):
            train_stages.drafter_to_continue(changed, target, tokenizer, store, start)
    other = load_target(str(make_target_folder(tmp_path_factory.mktemp("other"), seed=3)))
    with pytest.raises(CheckpointError, match="was trained for another target"):
        train_stages.drafter_to_continue(recipe_of(target_folder), other, tokenizer, store, start)


def test_traces_that_leave_nothing_to_evaluate_are_refused(target_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    said = [{"role": "user", "content": "to train"}, {"role": "assistant", "content": "a list"}]
    log.write_text(json.dumps({"messages": said}) + "\n")
    with pytest.raises(DataError, match="no answer of a held-out conversation"):
        run_specialise(recipe_of(target_folder), [log], tmp_path / "out", say=lambda line: None)
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    with pytest.raises((ConfigError, CheckpointError)):
        recipe_for(None, [], drafter, tmp_path)


def test_a_sample_of_one_conversation_never_lies_on_both_sides(first: Path) -> None:
    from draftkit.train.batches import split_source

    store = FeatureStore(first / "features")
    split, names = split_source(store, 0.3, 0), store.conversations()
    assert not set(names[split.train].tolist()) & set(names[split.validation].tolist())
    again = split_source(store, 0.3, 0)
    assert split.train.tolist() == again.train.tolist()

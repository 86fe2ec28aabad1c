"""Small training runs: a store of a few conversations, a recipe, and a function that trains from them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftkit import train_stages
from draftkit.config import Recipe, load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.draft.drafter import TrainBatch
from draftkit.features.store import FeatureStore
from draftkit.settings import CaptureSettings, TrainSettings
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from draftkit.train import trainer
from draftkit.train.parallel import ALONE
from draftkit.train.trainer import TrainReport
from support.stores import capture_by

WORDS = "list value holds step return what add number the a of is".split()
ALGORITHMS = ["dspark", "dflash", "eagle3"]


def conversations(count: int = 14) -> list[Conversation]:
    rng = random.Random(4)
    text = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randrange(low, high)))  # noqa: E731
    return [
        Conversation(
            f"c{i}", ["code", "chat"][i % 2], (Message("user", text(1, 6)), Message("assistant", text(3, 20)))
        )
        for i in range(count)
    ]


def recipe_for(target_folder: Path, algorithm: str = "dspark") -> Recipe:
    sizes = [
        "drafter.num_features=2",
        "drafter.num_layers=1",
        "drafter.block_size=4",
        "drafter.markov_rank=6",
    ]
    train = [
        "train.batch_size=4",
        "train.steps=12",
        "train.anchors=8",
        "train.lr=1e-2",
        "train.validate_every=4",
    ]
    train += ["train.validation_share=0.2", "train.decode_prompts=0", f"drafter.algorithm={algorithm}"]
    return load_recipe("tiny-dspark", [f"target.path={target_folder}", *sizes, *train])


@pytest.fixture(scope="session")
def recipe(target_folder: Path) -> Recipe:
    return recipe_for(target_folder)


@pytest.fixture(scope="session")
def tokenizer(target_folder: Path) -> Any:
    return load_tokenizer(str(target_folder))


@pytest.fixture(scope="session")
def store(
    target: TransformersTarget, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    folder = tmp_path_factory.mktemp("store")
    capture_by(
        target, TemplateFormat(tokenizer), conversations(), folder, (0, 2), CaptureSettings(dtype="float32")
    )
    return FeatureStore(folder)


@pytest.fixture
def fast(recipe: Recipe) -> TrainSettings:
    return recipe.train


@pytest.fixture
def run(store: FeatureStore, recipe: Recipe, target: TransformersTarget, tokenizer: Any) -> Any:
    def start(
        out: Path, settings: TrainSettings, report: Any = lambda p: None, drafter: Any = None, start: str = ""
    ) -> TrainReport:
        drafter = drafter or train_stages.new_drafter_for(recipe, target, tokenizer)
        return trainer.train(
            store, drafter, lambda: target, out, settings, {"note": "x"}, ALONE, report, start=start
        )

    return start


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_log(folder) if "loss" in r]


def in_double(batch: TrainBatch) -> TrainBatch:
    return replace(
        batch, features_BTF=batch.features_BTF.double(), last_hidden_BTH=batch.last_hidden_BTH.double()
    )

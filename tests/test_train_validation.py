"""Validation on features of their own, in place of a share of what is learnt from."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from draftkit import train_stages
from draftkit.config import load_recipe
from draftkit.data.messages import Conversation, Message
from draftkit.errors import CheckpointError
from draftkit.feature_stages import open_features, run_capture
from draftkit.features.source import FeatureSource
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from draftkit.train.batches import BatchMaker
from support.bar import Counted


def talks(count: int, domain: str) -> list[Conversation]:
    return [
        Conversation(
            f"{domain}{i}", domain, (Message("user", f"add {i}"), Message("assistant", f"is {i} " * 6))
        )
        for i in range(count)
    ]


def test_validation_is_on_the_given_features_and_all_others_are_learnt(
    target: TransformersTarget, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [
        "drafter.num_features=2",
        "drafter.num_layers=1",
        "drafter.block_size=4",
        "drafter.markov_rank=4",
    ]
    steps = ["train.steps=2", "train.batch_size=4", "train.anchors=4", "train.validate_every=1"]
    given = [f"target.path={target_folder}", *sizes, *steps, "train.decode_prompts=2"]
    recipe, tokenizer = load_recipe("tiny-dspark", given), load_tokenizer(str(target_folder))
    for name, made in (("learnt", talks(8, "code")), ("aside", talks(3, "chat"))):
        run_capture(target, tokenizer, recipe, made, tmp_path / name)
    learnt, aside = (open_features(recipe, target, tokenizer, [tmp_path / n]) for n in ("learnt", "aside"))
    made: list[tuple[FeatureSource, int]] = []
    init = BatchMaker.__init__

    def noted(self: BatchMaker, source: FeatureSource, indices: np.ndarray, *rest: object) -> None:
        made.append((source, len(indices)))
        init(self, source, indices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchMaker, "__init__", noted)
    out, bar = tmp_path / "drafter", Counted()
    monkeypatch.setattr(train_stages, "progress_bar", lambda *_, **__: nullcontext(bar))
    train_stages.run_train(target, tokenizer, recipe, learnt, out, lambda: target, None, aside)
    assert made == [(learnt, 8), (aside, 3)]
    told = [("validate", 3, 3), ("answer validation prompts", 2, 2)]  # each with a counter of its own
    assert [(part.title, part.total, part.done) for part in bar.parts] == 2 * told
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [line["validation"] for line in lines if "validation" in line]
    assert found and all("chat" in one and "code" not in one and one["decoded"] >= 1 for one in found)
    with pytest.raises(CheckpointError):  # a run that goes on validates on the same
        train_stages.run_train(target, tokenizer, recipe, learnt, out, lambda: target)

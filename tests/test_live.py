"""Live features: the same losses as from a store, the same bits after an interruption, and stores that fill
while training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftkit import feature_stages, stages, train_stages
from draftkit.config import Recipe, load_recipe
from draftkit.data.messages import Conversation, Message
from draftkit.draft.checkpoint import load_drafter
from draftkit.errors import ConfigError, FeatureStoreError, Interrupted
from draftkit.features.live import FillingFeatures
from draftkit.features.source import FeatureSource
from draftkit.features.store import FeatureStore
from draftkit.target.transformers import TransformersTarget
from draftkit.train import trainer
from draftkit.train.batches import BatchMaker, Cut
from draftkit.train.parallel import ALONE
from draftkit.train.trainer import Progress

WORDS = "list value holds step return what add number the a of is".split()


@pytest.fixture(scope="module")
def recipe(target_folder: Path) -> Recipe:
    sizes = [
        "drafter.num_features=2",
        "drafter.num_layers=1",
        "drafter.block_size=4",
        "drafter.markov_rank=6",
    ]
    train = ["train.batch_size=4", "train.steps=50", "train.anchors=8", "train.lr=1e-3"]
    train += ["train.validate_every=20", "train.validation_share=0.2", "train.decode_prompts=0"]
    return load_recipe(
        "tiny-dspark", [f"target.path={target_folder}", *sizes, *train, "capture.dtype=float32"]
    )


@pytest.fixture(scope="module")
def opened(recipe: Recipe) -> tuple[TransformersTarget, Any]:
    return stages.open_target(recipe)


def conversations(count: int = 22, seed: int = 4) -> list[Conversation]:
    rng = random.Random(seed)
    text = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randrange(low, high)))  # noqa: E731
    return [
        Conversation(
            f"c{i}", ["code", "chat"][i % 2], (Message("user", text(1, 6)), Message("assistant", text(3, 20)))
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def store(opened: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("store")
    feature_stages.run_capture(*opened, recipe, conversations(), folder)
    return FeatureStore(folder)


def run(opened: Any, recipe: Recipe, source: FeatureSource, out: Path, report: Any = lambda p: None) -> None:
    drafter = train_stages.new_drafter_for(recipe, *opened, source)
    trainer.train(source, drafter, lambda: opened[0], out, recipe.train, {}, ALONE, report)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_drafter(folder / "last").state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_live_and_stored_features_give_the_same_losses(
    dtype: str, opened: Any, recipe: Recipe, tmp_path: Path
) -> None:
    """Fifty steps; also where what is kept is rounded, and in windows."""
    capture = replace(recipe.capture, dtype=dtype, max_length=24)
    train = replace(recipe.train, steps=50 if dtype == "float32" else 10)
    chosen = recipe.model_copy(update={"capture": capture, "train": train})
    feature_stages.run_capture(*opened, chosen, conversations(), tmp_path / "features")
    stored = FeatureStore(tmp_path / "features")
    live = feature_stages.live_features(*opened, chosen, conversations(), tmp_path / "live")
    assert live.made_from() == stored.made_from(), "a run may go on with the other one"
    assert (live.lengths() == stored.lengths()).all() and max(live.lengths()) == 24
    run(opened, chosen, stored, tmp_path / "stored")
    run(opened, chosen, live, tmp_path / "live")
    # of roundings to 16 bits some fall to the other side
    assert losses(tmp_path / "live") == pytest.approx(
        losses(tmp_path / "stored"), abs=1e-5 if dtype == "float32" else 2e-3
    )
    assert not list(tmp_path.glob("live/**/shard-*.bin")) or sum(
        p.stat().st_size for p in tmp_path.glob("live/texts/shard-*.bin")
    ) <= 4 * sum(r.tokens for r in map(stored.record, range(len(stored)))), "text alone is written"


@pytest.mark.parametrize("keep", [False, True])
def test_a_live_run_goes_on_in_mid_epoch_to_the_same_bits(
    keep: bool, opened: Any, recipe: Recipe, tmp_path: Path
) -> None:
    def source(name: str) -> FeatureSource:
        folder = tmp_path / f"{name}-features" if keep else None
        return feature_stages.live_features(*opened, recipe, conversations(), tmp_path / name, folder)

    chosen = recipe.model_copy(update={"train": replace(recipe.train, steps=12)})
    run(opened, chosen, source("whole"), tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == 3:  # five steps are an epoch
            raise Interrupted(143)

    with pytest.raises(Interrupted):
        run(opened, chosen, source("parts"), tmp_path / "parts", stop)
    run(opened, chosen, source("parts"), tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_first_epoch_fills_a_store_that_training_then_reads(
    opened: Any, recipe: Recipe, store: FeatureStore, tmp_path: Path
) -> None:
    said = conversations()
    filling = feature_stages.live_features(*opened, recipe, said, tmp_path / "run", tmp_path / "kept")
    assert isinstance(filling, FillingFeatures)
    maker = BatchMaker(filling, range(len(filling)), 4, 5, 3, Cut(micro_batch_size=2))
    for step in range(maker.per_epoch):
        with pytest.raises(FeatureStoreError, match="not finished"):
            FeatureStore(tmp_path / "kept")
        list(maker.batches(step))
    kept = FeatureStore(tmp_path / "kept")
    assert len(kept) == len(store) and kept.made_from() == store.made_from()
    for one, other in zip(kept, store, strict=True):  # type: ignore[call-overload]
        assert one.id == other.id and torch.equal(one.tokens_T, other.tokens_T)
        torch.testing.assert_close(one.features_TF, other.features_TF, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.last_hidden_TH, other.last_hidden_TH, atol=1e-5, rtol=1e-5)
    again = feature_stages.live_features(*opened, recipe, said, tmp_path / "run", tmp_path / "kept")
    again._reader = None  # type: ignore[attr-defined]  # nothing is computed again
    list(BatchMaker(again, range(len(again)), 4, 5, 3, Cut()).batches(0))


def test_two_processes_fill_one_store(opened: Any, recipe: Recipe, tmp_path: Path) -> None:
    said = conversations()
    two = [
        feature_stages.live_features(*opened, recipe, said, tmp_path / f"run{i}", tmp_path / "kept")
        for i in range(2)
    ]
    for number, source in enumerate(two):
        cut = Cut(micro_batch_size=1, rank=number, processes=2)
        maker = BatchMaker(source, range(len(source)), 4, 5, 3, cut)
        for step in range(maker.per_epoch):
            list(maker.batches(step))
    kept = FeatureStore(tmp_path / "kept")
    assert len(kept) == len(said)
    assert len(list((tmp_path / "kept").glob("index-*.jsonl"))) == 2


def test_another_store_is_not_filled(
    opened: Any, recipe: Recipe, store: FeatureStore, tmp_path: Path
) -> None:
    changed = recipe.model_copy(update={"capture": replace(recipe.capture, dtype="bfloat16")})
    with pytest.raises(FeatureStoreError, match="holds a store of another dtype"):
        feature_stages.live_features(*opened, changed, conversations(), tmp_path, store.folder)
    with pytest.raises(FeatureStoreError, match="holds a store of other conversations"):
        feature_stages.live_features(*opened, recipe, conversations(seed=5), tmp_path, store.folder)


def test_stores_are_joined_by_weight(
    opened: Any, recipe: Recipe, store: FeatureStore, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    feature_stages.run_capture(*opened, recipe, conversations(8, seed=7), other)
    wanted = [store.folder, f"{other}=0.25"]
    joined = feature_stages.open_features(recipe, *opened, wanted)
    assert len(joined) == 22 + 8
    maker = BatchMaker(joined, range(len(joined)), 6, 5, 3, Cut())
    assert maker.per_epoch == 4  # of 22 + 2 samples
    counts = torch.zeros(30)
    for step in range(4 * 40):
        for i in maker.samples(step):
            counts[i] += 1
    assert float(counts[:22].min()) >= 39 and float(counts[:22].max()) <= 41
    assert float(counts[22:].mean()) == pytest.approx(10, abs=0.2)
    assert float(counts[22:].min()) >= 3, "no sample is left out for good"
    twice = feature_stages.open_features(recipe, *opened, [f"{other}=2"])
    assert sorted(BatchMaker(twice, range(8), 16, 5, 3, Cut()).samples(0)) == sorted([*range(8)] * 2)
    numbers = joined.conversations().tolist()
    assert len(set(numbers)) == 30
    run(opened, recipe.model_copy(update={"train": replace(recipe.train, steps=2)}), joined, tmp_path / "run")
    for wrong in ("0", "-1", "much", "nan"):
        with pytest.raises(ConfigError, match="is no weight"):
            feature_stages.open_features(recipe, *opened, [f"{other}={wrong}"])


def test_cross_entropy_alone_runs_no_layer_above_the_features(
    opened: Any, recipe: Recipe, store: FeatureStore, tmp_path: Path
) -> None:
    """DFlash's loss: the last layers run for the validation only, and losses are those of a store."""
    target = opened[0]
    chosen = load_recipe(
        "tiny-dflash", [f"target.path={target.info.name}", "drafter.num_layers=1", "capture.dtype=float32"]
    )
    drafter = replace(chosen.drafter, block_size=4, num_features=2, feature_layers=(0, 1))
    train = replace(recipe.train, steps=6, validate_every=6, loss=chosen.train.loss)
    chosen = chosen.model_copy(update={"drafter": drafter, "train": train})
    feature_stages.run_capture(*opened, chosen, conversations(), tmp_path / "features")
    passes = [0, 0]
    handles = [
        target.layers[layer].register_forward_hook(lambda *_, i=i: passes.__setitem__(i, passes[i] + 1))
        for i, layer in enumerate((1, 2))
    ]
    live = feature_stages.live_features(*opened, chosen, conversations(), tmp_path / "live")
    passes[:] = 0, 0
    run(opened, chosen, live, tmp_path / "live")
    for handle in handles:
        handle.remove()
    validations = -(-len(trainer.split_source(live, 0.2, 0).validation) // train.batch_size)
    assert passes[1] == validations and passes[0] == validations + 6
    run(opened, chosen, FeatureStore(tmp_path / "features"), tmp_path / "stored")
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "stored"), abs=1e-5)
    first, *_, last = [json.loads(x) for x in (tmp_path / "live" / "log.jsonl").read_text().splitlines()]
    assert "ce" in first and "tv" not in first and last["validation"]["macro"] > 1


def test_features_without_the_rest_of_a_pass_are_those_of_a_whole_one(opened: Any) -> None:
    target, tokens = opened[0], torch.arange(4, 14).reshape(2, 5)
    whole = target.forward(tokens, None, (1, 0)).features_BTF
    assert torch.equal(target.features(tokens, (1, 0)), whole)
    assert torch.equal(target.forward(tokens, None, (1, 0)).features_BTF, whole), "later passes are whole"

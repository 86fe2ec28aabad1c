"""A target cache as DeepSpec writes it, written here by hand: it trains as a store of the same features does,
and is refused by name where it is of something else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftkit import feature_stages, stages, train_stages
from draftkit.config import Recipe
from draftkit.data.messages import Conversation
from draftkit.errors import FeatureStoreError
from draftkit.features.compute import TargetReader
from draftkit.features.source import FeatureSource
from draftkit.features.store import FeatureStore
from draftkit.target.interface import Target
from support.training import conversations, losses, recipe_for

SHARD_SAMPLES = 6


@pytest.fixture(scope="module")
def recipe(target_folder: Path) -> Recipe:
    return recipe_for(target_folder)


@pytest.fixture(scope="module")
def opened(recipe: Recipe) -> tuple[Target, Any]:
    return stages.open_target(recipe)


@pytest.fixture(scope="module")
def store(opened: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """In bfloat16, of one domain, as a cache is."""
    folder = tmp_path_factory.mktemp("store")
    read = [Conversation(c.id, "all", c.messages) for c in conversations()]
    feature_stages.run_capture(*opened, recipe, read, folder)
    return FeatureStore(folder)


@pytest.fixture
def cache(opened: Any, recipe: Recipe, store: FeatureStore, tmp_path: Path) -> Path:
    """The texts of the store, read again by the target, in the form that DeepSpec's code describes."""
    folder, target = tmp_path / "cache", opened[0]
    folder.mkdir()
    layers = feature_stages.feature_layers_of(recipe, target)
    reader, index, names = TargetReader(target, layers, recipe.capture.batch_tokens), b"", []
    texts = [store.whole_text(i) for i in range(len(store))]
    read = reader.read(texts)
    for number, (text, (features, hidden)) in enumerate(zip(texts, read, strict=True)):
        shard, place = divmod(number, SHARD_SAMPLES)
        path = folder / f"shard-{shard:05d}.bin"
        if place == 0:
            path.write_bytes(b"")
            names.append(path.name)
        halves = [value.to(torch.bfloat16).view(torch.int16).numpy() for value in (features, hidden)]
        ids = text.tokens_E.numpy().astype("<i4")
        parts = [ids, np.ones(len(ids), "u1"), text.loss_mask_E.numpy().astype("u1"), *halves]
        at = [path.stat().st_size]
        with path.open("ab") as file:
            for part in parts:
                at.append(at[-1] + file.write(part.tobytes()))
        index += struct.pack("<QIIQQQQQ", number, shard, len(ids), *at[:-1])
    (folder / "samples.idx").write_bytes(index)
    note = {"version": 2, "num_samples": len(texts), "num_shards": len(names), "index_record_size": 56}
    note |= {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8"}
    note |= {"hidden_size": target.info.hidden_size, "target_layer_ids": list(layers)}
    note |= {"target_model_name_or_path": f"somebody/{Path(target.info.name).name}", "chat_template": "qwen"}
    note["shards"] = [{"shard_id": i, "file_name": name} for i, name in enumerate(names)]
    (folder / "manifest.json").write_text(json.dumps(note, indent=2, sort_keys=True))
    return folder


def test_a_cache_trains_as_a_store_of_the_same_features(
    opened: Any, recipe: Recipe, store: FeatureStore, cache: Path, tmp_path: Path
) -> None:
    source = feature_stages.open_features(recipe, *opened, [cache])
    assert source.lengths().tolist() == store.lengths().tolist()
    one, other = source.read([3])[0], store[3]
    assert torch.equal(one.tokens_T, other.tokens_T) and torch.equal(one.loss_mask_T, other.loss_mask_T)
    assert torch.equal(one.features_TF, other.features_TF), "what is not looked at is zero in both"

    def run(source: FeatureSource, out: Path) -> list[float]:
        train_stages.run_train(*opened, recipe, source, out)
        return losses(out)

    assert run(source, tmp_path / "cached") == run(store, tmp_path / "stored")


def test_a_cache_is_joined_with_a_store(
    opened: Any, recipe: Recipe, store: FeatureStore, cache: Path
) -> None:
    joined = feature_stages.open_features(recipe, *opened, [f"{cache}=0.5", store.folder])
    assert len(joined) == 2 * len(store)
    assert [s.id for s in joined.read([0, len(store)])] == [f"{cache}#0", store[0].id]
    assert joined.weights().tolist() == [0.5] * len(store) + [1.0] * len(store)


def changed(**fields: Any) -> Callable[[Path], None]:
    """Other fields in the manifest; None leaves one out."""

    def change(cache: Path) -> None:
        note = json.loads((cache / "manifest.json").read_text()) | fields
        kept = {k: v for k, v in note.items() if v is not None}
        (cache / "manifest.json").write_text(json.dumps(kept))

    return change


def written(name: str, at: int, what: bytes) -> Callable[[Path], None]:
    """Other bytes in a file."""

    def change(cache: Path) -> None:
        with (cache / name).open("r+b") as file:
            file.seek(at)
            file.write(what)

    return change


def cut(name: str, by: int) -> Callable[[Path], None]:
    """The end of a file torn off."""

    def change(cache: Path) -> None:
        (cache / name).write_bytes((cache / name).read_bytes()[:-by])

    return change


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (changed(version=3), r"of version 3, this draftkit reads 2"),
    (changed(target_model_name_or_path="Qwen/Qwen3-4B"), r"another target \(Qwen3-4B, asked for"),
    (changed(target_layer_ids=[0, 1]), r"another set of feature layers \(\[0, 1\], asked for \["),
    (changed(hidden_size=16), r"another hidden size \(16, asked for"),
    (changed(hidden_dtype="float16"), r"its hidden_dtype is float16, this draftkit reads bfloat16"),
    (changed(index_record_size=64), r"its index_record_size is 64, this draftkit reads 56"),
    (changed(shards=None), r"has no manifest of DeepSpec's target cache"),
    (changed(num_samples=3), r"the manifest tells of 3 samples"),
    (changed(shards=[{"file_name": "../elsewhere.bin"}]), r"a shard lies elsewhere"),
    (written("samples.idx", 0, b"\1"), r"its samples are not in order"),
    (written("samples.idx", 8, b"\77"), r"names a shard that the manifest lacks"),
    (written("samples.idx", 23, b"\377"), r"no shard is that long"),
    (written("shard-00000.bin", 0, struct.pack("<i", 10**6)), r"sample 0 has token 1000000"),
    (written("shard-00000.bin", 0, struct.pack("<i", -1)), r"sample 0 has token -1"),
    (cut("shard-00001.bin", 1), r"shard-00001.bin: has \d+ of \d+ bytes"),
    (cut("samples.idx", 1), r"has \d+ bytes, the manifest tells of"),
    (cut("manifest.json", 9), r"manifest.json: is damaged"),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS, ids=[told[:24] for _, told in FAULTS])
def test_a_cache_of_something_else_is_refused_by_name(
    fault: Callable[[Path], None], told: str, opened: Any, recipe: Recipe, cache: Path
) -> None:
    fault(cache)
    with pytest.raises(FeatureStoreError, match=told):
        feature_stages.open_features(recipe, *opened, [cache])


def test_a_cache_is_no_store_to_capture_into(opened: Any, recipe: Recipe, cache: Path) -> None:
    before = sorted((path.name, path.stat().st_size) for path in cache.iterdir())
    with pytest.raises(FeatureStoreError, match="is a target cache of DeepSpec, which is only read"):
        feature_stages.run_capture(*opened, recipe, conversations(), cache)
    assert sorted((path.name, path.stat().st_size) for path in cache.iterdir()) == before

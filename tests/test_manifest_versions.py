"""Stores of other versions are refused by name, with what to do, and nothing is written into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftkit.artefact import sealed
from draftkit.errors import FeatureStoreError
from draftkit.features.manifest import begin_store
from draftkit.features.store import FeatureStore
from draftkit.features.verify import verify
from support.stores import made_manifest, made_store, made_text


@pytest.mark.parametrize(
    ("version", "more", "told"),
    [
        (
            5,
            {"compression": "zstd"},
            r"is of version 5, this draftkit reads 4; take the draftkit that wrote it",
        ),
        (3, {}, r"is of version 3, this draftkit reads 4; capture again into an empty folder"),
        ("4", {}, r"is of version 4, this draftkit reads 4; capture again"),
        (None, {}, r"is of version None, this draftkit reads 4; capture again"),
    ],
)
def test_a_store_of_another_version_is_refused(
    version: Any, more: dict[str, Any], told: str, tmp_path: Path
) -> None:
    manifest = made_manifest(layers=(1, 2), hidden_size=4)
    folder = made_store(tmp_path / "store", [made_text(0, length=20)], manifest)
    path = folder / "manifest.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"version": version} | more)))
    before = {file.name: file.read_bytes() for file in folder.glob("*.*")}
    for use in (
        FeatureStore,
        lambda folder: begin_store(folder, manifest),
        lambda folder: verify(folder, True),
    ):
        with pytest.raises(FeatureStoreError, match=rf"manifest\.json: {told}"):
            use(folder)
    assert {file.name: file.read_bytes() for file in folder.glob("*.*")} == before


def test_a_manifest_without_a_version_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(sealed({"target": "x"})))
    with pytest.raises(FeatureStoreError, match=r"is damaged \('version'\); capture again"):
        FeatureStore(tmp_path)

"""What a feature store was made from: written once, before its first record, and never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from draftkit.artefact import DIGEST, is_intact, read_json, sealed
from draftkit.errors import FeatureStoreError
from draftkit.features.record import NO_FEATURES, STORED, RecordForm
from draftkit.output import naming, write_text

VERSION = 4
MANIFEST = "manifest.json"
MADE_FROM = {  # fields in words, where their names are not
    "fingerprint": "another target",
    "feature_layers": "other feature layers",
    "template_hash": "another chat template",
    "tokenizer_hash": "another tokenizer",
    "switches": "other template switches",
    "cut_answers": "another capture.cut_answers",
    "max_length": "another capture.max_length",
}


@dataclass(frozen=True)
class StoreManifest:
    """Target, layers, prompt format and settings; training refuses a store that does not match."""

    target: str
    fingerprint: str
    feature_layers: tuple[int, ...]  # layer OUTPUT indices
    template_hash: str
    tokenizer_hash: str
    dtype: str
    hidden_size: int
    max_length: int  # tokens of a window
    cut_answers: str
    version: int = VERSION
    switches: dict[str, Any] = field(default_factory=dict)  # of the chat template
    today: str | None = None  # the date that templates were given which print one

    def __post_init__(self) -> None:
        if self.dtype not in (NO_FEATURES, *STORED):
            raise ValueError(f"dtype {self.dtype!r} is not known")

    @property
    def form(self) -> RecordForm:
        """What its records hold."""
        return RecordForm(self.dtype, len(self.feature_layers), self.hidden_size)

    def made_from(self) -> dict[str, Any]:
        """Everything but the day, as JSON has it."""
        about: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del about["today"]
        return about

    def check_matches(
        self,
        where: str,
        fingerprint: str,
        feature_layers: tuple[int, ...],
        template_hash: str,
        tokenizer_hash: str,
        switches: Mapping[str, Any],
    ) -> None:
        """Raise FeatureStoreError that says which of target, layers, template, tokenizer or template switches
        differs."""
        wanted = {
            "target": (self.fingerprint, fingerprint),
            "feature layers": (list(self.feature_layers), list(feature_layers)),
            "chat template": (self.template_hash, template_hash),
            "tokenizer": (self.tokenizer_hash, tokenizer_hash),
            "set of template switches": (self.switches, dict(switches)),
        }
        for what, pair in wanted.items():
            if pair[0] != pair[1]:
                found, asked = (v[:16] if isinstance(v, str) else v for v in pair)
                raise FeatureStoreError(
                    f"{where}: was captured with another {what} ({found}, asked for {asked}); capture again"
                )


def begin_store(folder: Path, wanted: StoreManifest) -> StoreManifest:
    """Write the manifest of a new store, or read that of one that was begun: of several processes one writes.

    Raises FeatureStoreError that says in what a store that is there differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "state.json").exists():
        raise FeatureStoreError(f"{folder}: holds a data set of Hugging Face; choose another folder")
    if not (folder / MANIFEST).exists():
        mine = folder / f"{MANIFEST}.{os.getpid()}"
        write_text(mine, json.dumps(sealed(json.loads(json.dumps(asdict(wanted)))), indent=1) + "\n")
        try:
            with naming(folder / MANIFEST):
                os.link(mine, folder / MANIFEST)  # fails where another process was first
        except OSError:
            if not (folder / MANIFEST).exists():  # a file system without hard links
                mine.replace(folder / MANIFEST)
        mine.unlink(missing_ok=True)
    found = read_manifest(folder)
    differing = [k for k, v in wanted.made_from().items() if found.made_from()[k] != v]
    if differing:
        what = MADE_FROM.get(differing[0], f"another {differing[0].replace('_', ' ')}")
        raise FeatureStoreError(f"{folder}: holds a store of {what}; choose another folder or remove it")
    return found


def read_manifest(folder: Path) -> StoreManifest:
    """Raises FeatureStoreError when there is none, or it is damaged or of another version."""
    path = folder / MANIFEST
    if not path.exists():
        raise FeatureStoreError(f"{folder}: holds no feature store; make one with `draftkit capture`")
    raw = read_json(path, FeatureStoreError)
    try:
        if "target_layer_ids" in raw:
            raise FeatureStoreError(
                f"{folder}: is a target cache of DeepSpec, which is only read; give it to draftkit train -f"
            )
        if raw["version"] != VERSION:
            newer = isinstance(raw["version"], int) and raw["version"] > VERSION
            version = f"is of version {raw['version']}, this draftkit reads {VERSION}"
            do = "take the draftkit that wrote it" if newer else "capture again into an empty folder"
            raise FeatureStoreError(f"{path}: {version}; {do}")
        if not is_intact(raw):
            raise FeatureStoreError(
                f"{path}: is damaged (another digest than its own); capture again into an empty folder"
            )
        del raw[DIGEST]
        return StoreManifest(**{**raw, "feature_layers": tuple(raw["feature_layers"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatureStoreError(
            f"{path}: is damaged ({error}); capture again into an empty folder"
        ) from error

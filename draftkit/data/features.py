"""The feature store: what the target thought while it read conversations, in checksummed shards with a
manifest.

A store is a folder with `manifest.json` and `shard-00000.safetensors`, ... A shard holds, for its
conversations laid end to end (N tokens): tokens int64 [N], loss_mask bool [N], features [N, F], last_hidden
[N, H]. Features and last hidden state at t come from the target after it has read tokens 0..t of the
conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draftkit.artefact import DIGEST, is_intact, is_plain_name, read_json, sealed
from draftkit.errors import FeatureStoreError
from draftkit.output import sha256_of, write_tensors, write_text

VERSION = 3
MANIFEST = "manifest.json"
PARTS = ("tokens", "loss_mask", "features", "last_hidden")


@dataclass(frozen=True)
class SampleEntry:
    """Where a sample lies in its shard; `conversation` is what it is part of, itself where nothing is
    said."""

    id: str
    domain: str
    start: int
    length: int
    conversation: str = ""


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard."""

    file: str
    sha256: str
    bytes: int
    samples: tuple[SampleEntry, ...]


@dataclass(frozen=True)
class StoreManifest:
    """What a store was made from; training refuses one that does not match."""

    target: str
    fingerprint: str
    feature_layers: tuple[int, ...]
    template_hash: str
    tokenizer_hash: str
    conversations_hash: str
    conversations: int  # as many as a finished store holds
    dtype: str
    hidden_size: int
    version: int = VERSION
    switches: dict[str, Any] = field(default_factory=dict)  # of the chat template
    today: str | None = None  # the date that templates were given which print one
    shards: tuple[ShardEntry, ...] = field(default=())

    def made_from(self) -> dict[str, object]:
        """Everything but the shards and the day."""
        return {k: v for k, v in asdict(self).items() if k not in ("shards", "today")}


@dataclass(frozen=True)
class FeatureSample:
    """One conversation: tokens int64 [T], loss_mask bool [T], features [T, F], last_hidden [T, H]."""

    id: str
    domain: str
    tokens_T: Tensor
    loss_mask_T: Tensor
    features_TF: Tensor
    last_hidden_TH: Tensor


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Replace the manifest in one rename."""
    note = sealed(json.loads(json.dumps(asdict(manifest))))
    write_text(folder / MANIFEST, json.dumps(note, indent=1) + "\n")


def read_manifest(folder: Path) -> StoreManifest:
    """Raises FeatureStoreError when there is none, or it is damaged or of another version."""
    path = folder / MANIFEST
    if not path.exists():
        raise FeatureStoreError(f"{folder}: holds no feature store; make one with `draftkit capture`")
    raw = read_json(path, FeatureStoreError)
    try:
        if raw["version"] != VERSION:
            version = f"is of version {raw['version']}, this draftkit reads {VERSION}"
            raise FeatureStoreError(f"{path}: {version}; capture again into an empty folder")
        if not is_intact(raw):
            raise FeatureStoreError(
                f"{path}: is damaged (another digest than its own); capture again into an empty folder"
            )
        del raw[DIGEST]
        shards = tuple(_shard_entry(shard) for shard in raw.pop("shards"))
        return StoreManifest(**{**raw, "feature_layers": tuple(raw["feature_layers"]), "shards": shards})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatureStoreError(
            f"{path}: is damaged ({error}); capture again into an empty folder"
        ) from error


def _shard_entry(raw: dict[str, Any]) -> ShardEntry:
    """An entry of the manifest. Raises ValueError, TypeError or KeyError for one that no capture writes."""
    entry = ShardEntry(**{**raw, "samples": tuple(SampleEntry(**s) for s in raw["samples"])})
    if not is_plain_name(entry.file):
        raise ValueError(f"shard {entry.file!r:.80} is not the name of a file in this folder")
    numbers = [entry.bytes, *(n for s in entry.samples for n in (s.start, s.length))]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"shard {entry.file}: sizes and places must be whole numbers from 0 on")
    return entry


def write_shard(
    folder: Path, name: str, tensors: dict[str, Tensor], samples: tuple[SampleEntry, ...]
) -> ShardEntry:
    """Write one shard in one rename and describe it. Raises OSError that names it when the disk does not take
    it."""
    partial = folder / (name + ".partial")
    write_tensors(partial, tensors, save_file)
    digest = sha256_of(partial)
    size = partial.stat().st_size
    partial.replace(folder / name)
    return ShardEntry(name, digest, size, samples)


class FeatureStore:
    """Reader: `len(store)` conversations, `store[i]` one of them. Shards are checked when they are first
    read; they stay on disk, mapped into memory, and only the conversation that is asked for is copied.
    Threads may share a store.

    Raises FeatureStoreError when shards are missing or damaged, or do not hold what the manifest says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._index = [(shard, s) for shard in self.manifest.shards for s in shard.samples]
        self._opened: dict[str, Any] = {}
        for shard in self.manifest.shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                found = path.stat().st_size if path.is_file() else 0
                raise FeatureStoreError(
                    f"{path}: has {found} of {shard.bytes} bytes; remove it and run capture again"
                )
        if len(self) != self.manifest.conversations:
            holds = f"holds {len(self)} of {self.manifest.conversations} conversations"
            raise FeatureStoreError(f"{folder}: {holds}; run the same `draftkit capture` again to finish it")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> FeatureSample:
        shard, entry = self._index[index]
        opened = self._shard(shard)
        end, held = entry.start + entry.length, opened.get_slice("tokens").get_shape()[0]
        if not 0 <= entry.start < end <= held:
            where = f"{entry.id!r} at tokens {entry.start} to {end} of {held} in {shard.file}"
            raise FeatureStoreError(
                f"{self.folder / MANIFEST}: is damaged ({where}); capture again into an empty folder"
            )
        parts = (opened.get_slice(name)[entry.start : end] for name in PARTS)
        return FeatureSample(entry.id, entry.domain, *parts)

    def lengths(self) -> list[int]:
        """Tokens of each conversation, without reading a shard."""
        return [entry.length for _, entry in self._index]

    def domains(self) -> list[str]:
        """The domain of each conversation."""
        return [entry.domain for _, entry in self._index]

    def conversations(self) -> list[str]:
        """The id of the conversation that each sample is part of."""
        return [entry.conversation or entry.id for _, entry in self._index]

    def check_matches(
        self,
        fingerprint: str,
        feature_layers: tuple[int, ...],
        template_hash: str,
        tokenizer_hash: str,
        switches: Mapping[str, Any],
    ) -> None:
        """Raise FeatureStoreError that says which of target, layers, template, tokenizer or template switches
        differs."""
        wanted = {
            "target": (self.manifest.fingerprint, fingerprint),
            "feature layers": (self.manifest.feature_layers, feature_layers),
            "chat template": (self.manifest.template_hash, template_hash),
            "tokenizer": (self.manifest.tokenizer_hash, tokenizer_hash),
            "set of template switches": (self.manifest.switches, dict(switches)),
        }
        for what, (found, asked) in wanted.items():
            if found != asked:
                shown = [
                    v[:16] if isinstance(v, str) else v if isinstance(v, dict) else list(v)
                    for v in (found, asked)
                ]
                raise FeatureStoreError(
                    f"{self.folder}: was captured with another {what} ({shown[0]}, asked for {shown[1]}); "
                    f"capture again"
                )

    def _shard(self, shard: ShardEntry) -> Any:
        if shard.file not in self._opened:
            path = self.folder / shard.file
            if sha256_of(path) != shard.sha256:
                raise FeatureStoreError(
                    f"{path}: is damaged (checksum differs); remove it and run capture again"
                )
            try:
                self._opened[shard.file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise FeatureStoreError(
                    f"{path}: is damaged ({error}); remove it and run capture again"
                ) from error
        return self._opened[shard.file]

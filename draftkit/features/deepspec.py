"""A target cache that DeepSpec wrote (its `prepare_target_cache.py`, manifest version 2) as a source.

    manifest.json      target's name, layers, hidden size, names of the shards
    samples.idx        56 bytes for each sample: number, shard, tokens, and where its five tensors lie
    shard-NNNNN.bin    ids int32 [T], attention mask uint8 [T], loss mask uint8 [T], features bfloat16
                       [T, F], last hidden states after the final norm bfloat16 [T, H]; little-endian

Its layers are OUTPUT indices, as draftkit's, and its loss mask marks the tokens that the assistant wrote. It
holds no checksums and does not say with which template switches it was rendered; so neither can be checked.

Shapes: T tokens, F = K * H features of K layers, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftkit.artefact import is_plain_name, read_json
from draftkit.errors import FeatureStoreError
from draftkit.features.source import (
    DOMAIN,
    FeatureSample,
    OthersSamples,
    context_of,
    empty_sample,
    target_places,
)
from draftkit.target.interface import TargetInfo

VERSION = 2
INDEX = "samples.idx"
PLACES = ("ids", "attention", "mask", "features", "last_hidden")  # of a sample's tensors in its shard
INDEX_RECORD = np.dtype(
    [("sample", "<u8"), ("shard", "<u4"), ("tokens", "<u4"), *((name, "<u8") for name in PLACES)]
)
DTYPES = {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8"}
LOOKED_AT = 64  # samples whose ids are compared with the vocabulary before a run begins


def is_target_cache(folder: Path) -> bool:
    """Whether DeepSpec wrote this folder."""
    return (folder / INDEX).is_file()


class TargetCache(OthersSamples):
    """The samples of a cache for a target and the layers of a drafter. Threads may share it.

    Raises FeatureStoreError that names what differs: version, kinds of numbers, target, layers, hidden size,
    a token beyond the vocabulary; or a file that is missing or short.
    """

    ahead = True

    def __init__(self, folder: Path, info: TargetInfo, layers: Sequence[int]) -> None:
        self.folder, self.name = folder, str(folder)
        self._info, self._width, self._hidden = info, len(layers) * info.hidden_size, info.hidden_size
        raw = read_json(folder / "manifest.json", FeatureStoreError)
        try:
            self._manifest = dict(raw)
            self._check_form()
            self._check_target(sorted(layers))
            self._shards = [folder / shard["file_name"] for shard in self._manifest["shards"]]
            if not all(is_plain_name(shard["file_name"]) for shard in self._manifest["shards"]):
                raise FeatureStoreError(
                    f"{folder}/manifest.json: a shard lies elsewhere; copy the cache again"
                )
            samples = int(self._manifest["num_samples"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FeatureStoreError(
                f"{folder}: has no manifest of DeepSpec's target cache ({error!r}); copy it again"
            ) from error
        self._index = self._read_index(samples)
        for i in range(0, samples, max(1, samples // LOOKED_AT)):
            self.text(i)

    def __len__(self) -> int:
        return len(self._index)

    def lengths(self) -> NDArray[np.int64]:
        """See `FeatureSource`."""
        return self._index["tokens"].astype(np.int64)

    def made_from(self) -> dict[str, Any]:
        """The manifest, and a digest of the index."""
        return {"deepspec": self._manifest, "index": hashlib.sha256(self._index.tobytes()).hexdigest()}

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """See `FeatureSource`. Raises FeatureStoreError for a token that the target does not have."""
        tokens = int(self._index["tokens"][index])
        ids_T = self._part(index, "ids", np.dtype("<i4"), tokens).astype(np.int64)
        if ids_T.min() < 0 or ids_T.max() >= self._info.vocab_size:
            worst = int(ids_T.min() if ids_T.min() < 0 else ids_T.max())
            raise FeatureStoreError(
                f"{self.name}: sample {index} has token {worst}, {self._info.name} has "
                f"{self._info.vocab_size}; give the cache of this target"
            )
        mask_T = self._part(index, "mask", np.dtype(np.uint8), tokens) > 0
        return torch.from_numpy(ids_T), torch.from_numpy(mask_T)

    def read(self, indices: Sequence[int], last_hidden: bool = True) -> list[FeatureSample]:
        """See `FeatureSource`; what no block and no loss looks at is not read."""
        return [self._sample(i, last_hidden) for i in indices]

    def empty(self) -> FeatureSample:
        """See `FeatureSource`."""
        return empty_sample(self._width, self._hidden, torch.bfloat16)

    def _sample(self, index: int, last_hidden: bool) -> FeatureSample:
        tokens_T, mask_T = self.text(index)
        places = target_places(mask_T)
        end = int(places[-1]) + 1 if len(places) else 0
        features_TF = self._vectors(index, "features", self._width, 0, context_of(mask_T), len(tokens_T))
        if not last_hidden:
            hidden_TH = features_TF[:, :0]
            return FeatureSample(f"{self.name}#{index}", DOMAIN, tokens_T, mask_T, features_TF, hidden_TH)
        begin = int(places[0]) if len(places) else 0
        hidden_TH = self._vectors(index, "last_hidden", self._hidden, begin, end, len(tokens_T))
        return FeatureSample(f"{self.name}#{index}", DOMAIN, tokens_T, mask_T, features_TF, hidden_TH)

    def _vectors(self, index: int, name: str, width: int, begin: int, end: int, tokens: int) -> Tensor:
        """bfloat16 [tokens, width], those from `begin` to `end` read, the others zero."""
        out = torch.zeros(tokens, width, dtype=torch.bfloat16)
        numbers = self._part(index, name, np.dtype("<i2"), (end - begin) * width, 2 * begin * width)
        out[begin:end] = torch.from_numpy(numbers).view(torch.bfloat16).view(-1, width)
        return out

    def _part(self, index: int, name: str, dtype: np.dtype[Any], count: int, skip: int = 0) -> NDArray[Any]:
        row = self._index[index]
        path = self._shards[int(row["shard"])]
        try:
            found = np.fromfile(path, dtype, count, offset=int(row[name]) + skip)
        except OSError as error:
            raise FeatureStoreError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
        if len(found) < count:
            raise FeatureStoreError(f"{path}: ends within sample {index}; copy it again")
        return found

    def _check_form(self) -> None:
        version = self._manifest["version"]
        if version != VERSION:
            raise FeatureStoreError(
                f"{self.name}: is DeepSpec's target cache of version {version}, this draftkit reads {VERSION}"
            )
        for name, wanted in {**DTYPES, "index_record_size": INDEX_RECORD.itemsize}.items():
            if self._manifest[name] != wanted:
                found = self._manifest[name]
                raise FeatureStoreError(f"{self.name}: its {name} is {found}, this draftkit reads {wanted}")

    def _check_target(self, layers: list[int]) -> None:
        """Of the target only the name is known: that of the folder or the hub id, without who owns it."""
        given = str(self._manifest.get("target_model_name_or_path"))
        pairs = {
            "target": (Path(given).name, Path(self._info.name).name),
            "set of feature layers": (self._manifest["target_layer_ids"], layers),
            "hidden size": (self._manifest["hidden_size"], self._hidden),
        }
        for what, (found, asked) in pairs.items():
            if found != asked:
                told = f"was captured with another {what} ({found}, asked for {asked})"
                raise FeatureStoreError(f"{self.name}: {told}; give the cache that fits, or the recipe")

    def _read_index(self, samples: int) -> NDArray[Any]:
        path = self.folder / INDEX
        size = path.stat().st_size
        if not samples or size != samples * INDEX_RECORD.itemsize:
            told = f"has {size} bytes, the manifest tells of {samples} samples"
            raise FeatureStoreError(f"{path}: {told}; copy the cache again")
        index = np.fromfile(path, INDEX_RECORD)
        ends = np.zeros(len(self._shards), np.uint64)
        tokens = index["tokens"].astype(np.uint64)
        sizes = dict(zip(PLACES, (4, 1, 1, 2 * self._width, 2 * self._hidden), strict=True))
        if (index["sample"] != np.arange(samples)).any() or not (tokens > 0).all():
            raise FeatureStoreError(f"{path}: is damaged (its samples are not in order); copy it again")
        if int(index["shard"].max()) >= len(self._shards):
            raise FeatureStoreError(f"{path}: names a shard that the manifest lacks; copy the cache again")
        for name, each in sizes.items():
            if (index[name] >> 62).any():
                raise FeatureStoreError(f"{path}: is damaged (no shard is that long); copy it again")
            np.maximum.at(ends, index["shard"], index[name] + tokens * np.uint64(each))
        for shard, end in zip(self._shards, ends.tolist(), strict=True):
            has = shard.stat().st_size if shard.is_file() else 0
            if has < end:
                raise FeatureStoreError(f"{shard}: has {has} of {end} bytes; copy it again")
        return index

"""The safetensors files of a checkpoint: which tensor lies where."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files


def tensor_places(source: str, revision: str | None = None) -> dict[str, str]:
    """The file of each tensor. Shards of a hub checkpoint are fetched where they are missing."""
    single = cached_file(
        source, SAFE_WEIGHTS_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if single is not None:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), str(single))
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    paths, about = get_checkpoint_shard_files(source, str(index), revision=revision)
    by_name = {Path(path).name: str(path) for path in paths}
    return {tensor: by_name[file] for tensor, file in about["weight_map"].items()}

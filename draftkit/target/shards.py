"""The safetensors files of a checkpoint: which tensor lies where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from draftkit.artefact import is_plain_name, read_json
from draftkit.errors import TargetError, one_line


def tensor_places(source: str, revision: str | None = None) -> dict[str, str]:
    """The file of each tensor. Shards of a hub checkpoint are fetched where they are missing. Raises
    TargetError for a checkpoint without an index, and for a file or an index that cannot be read."""
    single = _file(source, SAFE_WEIGHTS_NAME, revision)
    if single is not None:
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), str(single))
        except (SafetensorError, OSError) as error:
            raise TargetError(f"{single}: is damaged ({one_line(error)}); copy it again") from error
    index = _file(source, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        raise TargetError(
            f"{source}: has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}; copy it again"
        )
    places = _file_names(index)
    if Path(source).is_dir():
        return {tensor: str(index.with_name(file)) for tensor, file in places.items()}
    paths, _ = get_checkpoint_shard_files(source, str(index), revision=revision)
    by_name = {Path(path).name: str(path) for path in paths}
    return {tensor: by_name[file] for tensor, file in places.items()}


def _file(source: str, name: str, revision: str | None) -> Path | None:
    found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(str(found))


def _file_names(index: Path) -> dict[str, str]:
    """What an index says: tensors' names and the names of files beside it."""
    said: Any = read_json(index, TargetError)
    places = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(places, dict) or not places or not all(map(is_plain_name, places.values())):
        raise TargetError(f"{index}: has no weight_map from tensors to files beside it; copy it again")
    return places

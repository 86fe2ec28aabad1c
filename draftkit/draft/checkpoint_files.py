"""The files of a drafter's folder: weights in safetensors, one or shards, and notes that vouch for them.
Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftkit.artefact import is_plain_name, read_json, was_changed
from draftkit.draft.checkpoint_fields import Fields
from draftkit.errors import CheckpointError
from draftkit.output import sha256_of

WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "draftkit.json"
INDEX = WEIGHTS + ".index.json"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The wanted tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises CheckpointError when a file is missing or damaged (a folder of draftkit's holds the sha256 of its
    weights), or lacks what the index says.
    """
    if (folder / WEIGHTS).exists():
        _check_digest(folder)
        return _read_file(folder / WEIGHTS, wanted)
    if not (folder / INDEX).exists():
        pickled = any(folder.glob("*.bin"))
        reason = (
            "its weights are pickled; convert them to safetensors"
            if pickled
            else "give the folder of a drafter"
        )
        raise CheckpointError(f"{folder}: has no {WEIGHTS}; {reason}")
    places = Fields(read_note(folder / INDEX), str(folder / INDEX)).section("weight_map").raw
    places = {tensor: file for tensor, file in places.items() if wanted(tensor)}
    shards = {}
    for name in sorted(set(map(str, places.values()))):
        if not is_plain_name(name) or not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: the index names {name}, which is not in the folder; copy it again"
            )
        shards[name] = _read_file(folder / name, wanted)
    lost = sorted(tensor for tensor, file in places.items() if tensor not in shards[str(file)])
    if lost:
        raise CheckpointError(f"{folder}: the shards lack {', '.join(lost[:4])}, which the index names")
    return {tensor: value for shard in shards.values() for tensor, value in shard.items()}


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `draftkit.json` says, or an empty dict for a drafter that draftkit did not train."""
    path = folder / PROVENANCE
    return Fields(read_note(path), str(path)).raw if path.exists() else {}


def read_note(path: Path) -> Any:
    """What a JSON file of a folder says. Raises CheckpointError."""
    return read_json(path, CheckpointError)


def _read_file(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {n: file.get_tensor(n) for n in file.keys() if wanted(n)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); train or copy it again") from error
    wrong = next((n for n, t in tensors.items() if t.dtype in _FLOATS and not bool(t.isfinite().all())), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong} holds numbers that are not finite; train or copy it again")
    return tensors


def _check_digest(folder: Path) -> None:
    """Raise CheckpointError when provenance, configuration or weights are not those that draftkit wrote, if
    it wrote them. Folders from before the digest hold that of the weights alone."""
    note, again = read_provenance(folder), "train or copy it again"
    if was_changed(note):
        raise CheckpointError(f"{folder / PROVENANCE}: is damaged (another digest than its own); {again}")
    for field, name in (("sha256", WEIGHTS), ("config_sha256", CONFIG)):
        if note.get(field) and note[field] != sha256_of(folder / name):
            differs = f"is damaged (another sha256 than in {PROVENANCE})"
            raise CheckpointError(f"{folder / name}: {differs}; {again}, or remove {PROVENANCE}")

"""The resumable state of a training run: parameters, AdamW moments and position; safetensors and JSON only."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftkit.draft.checkpoint import check_tensors
from draftkit.draft.drafter import Drafter
from draftkit.errors import CheckpointError


@dataclass(frozen=True)
class Position:
    """Where a run is. `fingerprint` ties the state to its recipe and data."""

    step: int
    seconds: float
    best: float
    fingerprint: str


def save_state(folder: Path, drafter: Drafter, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Write beside the old state, then swap: a kill at any moment leaves the old state or the new one."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tensors = {f"model.{n}": p.detach().clone() for n, p in drafter.named_parameters() if p.requires_grad}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": torch.as_tensor(value).clone() for name, value in moments.items()}
    save_file(tensors, new / "state.safetensors")
    (new / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(
    folder: Path, drafter: Drafter, optimizer: torch.optim.Optimizer, fingerprint: str
) -> Position | None:
    """Restore in place; None when there is nothing to go on from.

    Raises CheckpointError when the state is damaged or belongs to another recipe or other data.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # killed between the two renames of a swap
        old.rename(folder)
    if not folder.exists():
        return None
    try:
        position = Position(**json.loads((folder / "position.json").read_text("utf-8")))
        tensors = load_file(folder / "state.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: is damaged ({error}); remove it to start anew") from error
    if position.fingerprint != fingerprint:
        raise CheckpointError(f"{folder}: belongs to another recipe or other features; remove it or choose another folder")
    trained = {n: p for n, p in drafter.named_parameters() if p.requires_grad}
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    check_tensors(str(folder), {n: p.shape for n, p in trained.items()}, weights)
    for name, parameter in trained.items():
        parameter.data.copy_(weights[name])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return position

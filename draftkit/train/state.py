"""The resumable state of a training run: parameters, AdamW moments and position.

Tensors are stored whole, whatever the number of processes, so that another number of them can go on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from draftkit.draft.checkpoint import check_tensors
from draftkit.errors import CheckpointError
from draftkit.train.folder import read_folder, write_folder
from draftkit.train.parallel import ParallelDrafter, to_part, to_whole

WEIGHT = "model."  # before the names of parameters; moments are NAME.exp_avg and so on, after "adam."
MOMENT = "adam."


@dataclass(frozen=True)
class Position:
    """Where a run is. `fingerprint` ties the state to its recipe and data.

    `best` is the best validation's accepted length so far, `stale` the validations since, `skipped` all
    skipped steps.
    """

    step: int
    seconds: float
    best: float
    stale: int
    skipped: int
    fingerprint: str


def save_state(
    folder: Path, parallel: ParallelDrafter, optimizer: torch.optim.Optimizer, position: Position
) -> None:
    """Replace the state; all processes call it, the first one writes. Raises OSError when the disk does not
    take it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parallel.trained.items():
        tensors[WEIGHT + name] = to_whole(parameter.detach())
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{MOMENT}{name}.{kind}"] = to_whole(torch.as_tensor(value))
    if parallel.world.first:
        write_folder(folder, tensors, asdict(position))


def load_state(
    folder: Path, parallel: ParallelDrafter, optimizer: torch.optim.Optimizer, fingerprint: str
) -> Position | None:
    """Restore in place; None when there is nothing to go on from. All processes read the same folder.

    Raises CheckpointError when the state is damaged or belongs to another recipe or other data.
    """
    found = read_folder(folder)
    if found is None:
        return None
    tensors, note = found
    try:
        position = Position(**note)
    except TypeError as error:
        raise CheckpointError(f"{folder}: is damaged ({error}); remove it to start anew") from error
    if position.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder}: belongs to another recipe or other features; remove it or choose another folder"
        )
    trained = parallel.trained
    weights = {k.removeprefix(WEIGHT): v for k, v in tensors.items() if k.startswith(WEIGHT)}
    check_tensors(str(folder), {n: p.shape for n, p in trained.items()}, weights)
    moments: dict[int, dict[str, Tensor]] = {}
    places = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    for name, parameter in trained.items():
        index = places[id(parameter)]
        with torch.no_grad():
            parameter.copy_(to_part(weights[name], parameter))
        for key, value in tensors.items():
            before, _, kind = key.rpartition(".")
            if before == MOMENT + name:
                like = parameter if value.shape == parameter.shape and value.ndim else value
                moments.setdefault(index, {})[kind] = to_part(value, like)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return position

"""A drafter's folder as it lies there, beside its target: nothing is refused yet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftkit.draft.algorithms import held_by
from draftkit.draft.checkpoint import assemble, shape_of
from draftkit.draft.checkpoint_files import CONFIG, read_note, read_provenance, read_tensors
from draftkit.draft.drafter import Drafter
from draftkit.errors import CheckpointError
from draftkit.target.interface import TargetWeights


@dataclass(frozen=True)
class Pair:
    """`raw` is what `config.json` holds, `tensors` the weights under the names that they have in the files,
    `note` the drafter's provenance (empty when draftkit did not train it)."""

    folder: Path
    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    note: dict[str, Any]
    target: TargetWeights
    tokenizer: Any

    def changed(self, raw: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None) -> Pair:
        """The same with other fields, or other tensors."""
        return replace(self, raw=raw or self.raw, tensors=self.tensors if tensors is None else tensors)

    def with_fields(self, **fields: Any) -> Pair:
        """The same with some fields of `config.json` set."""
        return self.changed(raw=copy.deepcopy(self.raw) | fields)

    def drafter(self, dtype: torch.dtype) -> Drafter:
        """The drafter that this is, on the target's device. Raises CheckpointError when it is none."""
        where, target = str(self.folder), self.target
        shape = shape_of(self.raw, f"{where}/{CONFIG}", target.info.num_layers)
        if (shape.vocab_size, shape.hidden_size) != (target.info.vocab_size, target.info.hidden_size):
            raise CheckpointError(f"{where}: vocabulary or hidden size differ from those of its target")
        return assemble(where, shape, dict(self.tensors), dtype, target).to(target.device)


def open_pair(folder: Path, target: TargetWeights, tokenizer: Any) -> Pair:
    """Read a folder. Raises CheckpointError when files are missing, damaged or pickled."""
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder}: has no {CONFIG}; give the folder of a drafter")
    raw = read_note(folder / CONFIG)
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{folder / CONFIG}: is a {type(raw).__name__}, must be a mapping; copy it again"
        )
    tensors = read_tensors(folder, _own_names(raw, folder, target))
    return Pair(folder, raw, tensors, read_provenance(folder), target, tokenizer)


def _own_names(raw: dict[str, Any], folder: Path, target: TargetWeights) -> Callable[[str], bool]:
    """Which tensors of a folder are the drafter's: a checkpoint of DeepSeek-V4 holds its target, too."""
    try:
        return held_by(shape_of(raw, str(folder), target.info.num_layers))
    except CheckpointError:  # that is said where the drafter is made
        return lambda name: True

"""A state folder: tensors and a note about them, replaced as a whole; safetensors and JSON only.

A kill at any moment leaves the old state or the new one; the note holds the tensors' sha256 and its own
digest.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftkit.artefact import DIGEST, is_intact, read_json, sealed
from draftkit.errors import CheckpointError, reason
from draftkit.output import newest_folder, sha256_of, swap_folder, write_tensors, write_text

TENSORS, NOTE = "state.safetensors", "position.json"


def write_folder(folder: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write beside the old state, then swap. Raises OSError that names the file when the disk does not take
    it."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_tensors(new / TENSORS, {k: v.cpu().contiguous() for k, v in tensors.items()}, save_file)
    write_text(new / NOTE, json.dumps(sealed(note | {"sha256": sha256_of(new / TENSORS)})))
    swap_folder(new, folder)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest state's tensors and note; None when there is none. Raises CheckpointError when it is
    damaged."""
    source = newest_folder(folder)
    if source is None:
        return None
    try:
        note = read_json(source / NOTE, CheckpointError)
        if not is_intact(note):
            raise CheckpointError(
                f"{source / NOTE}: is damaged (another digest than its own); remove {source} to start anew"
            )
        del note[DIGEST]
        wanted = note.pop("sha256")
        if sha256_of(source / TENSORS) != wanted:
            raise CheckpointError(
                f"{source / TENSORS}: is damaged (another sha256 than in {NOTE}); remove {source} to "
                f"start anew"
            )
        return load_file(source / TENSORS), note
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{source}: is damaged ({reason(error)}); remove it to start anew") from error

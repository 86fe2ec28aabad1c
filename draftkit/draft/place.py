"""Whether a path is that of a drafter for a target, found out before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from draftkit.errors import CheckpointError
from draftkit.suggest import no_folder
from draftkit.target.fingerprint import fingerprint
from draftkit.target.place import sizes_of

_INSIDE = ("best", "drafter/best", "last")  # where the folders of a run have theirs


def check_drafter(folder: Path, target: Path | None = None) -> None:
    """Raise CheckpointError unless the folder holds a drafter, and, as far as both say, one for the target in
    this folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {no_folder(folder, 'the folder of a drafter')}")
    if not (folder / "config.json").exists():
        inside = next((folder / name for name in _INSIDE if (folder / name / "config.json").exists()), None)
        hint = f"did you mean {inside}?" if inside else "give the folder of a drafter"
        raise CheckpointError(f"{folder}: has no config.json; {hint}")
    if target is not None and target.is_dir():
        _check_fits(folder, target)


def _check_fits(folder: Path, target: Path) -> None:
    note = _note(folder)
    named = f" ({note['target']})" if isinstance(note.get("target"), str) else ""
    own, wanted = sizes_of(folder).get("hidden_size"), sizes_of(target).get("hidden_size")
    if isinstance(own, int) and isinstance(wanted, int) and own != wanted:
        raise CheckpointError(
            f"{folder}: is for another target{named} (hidden size {own}, that of {target} is {wanted}); give "
            f"the drafter of this one, or --target of that one"
        )
    made_for = note.get("target_fingerprint")
    if made_for and made_for != fingerprint(target):
        raise CheckpointError(
            f"{folder}: was trained for another target{named} than {target}; train it again, or give "
            "--target of that one"
        )


def _note(folder: Path) -> dict[str, Any]:
    """What draftkit wrote beside a drafter; empty where it is not draftkit's, or damaged, which loading it
    tells."""
    try:
        return dict(json.loads((folder / "draftkit.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}

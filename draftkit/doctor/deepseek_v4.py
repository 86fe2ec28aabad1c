"""DeepSeek-V4 in files: checkpoint, module and encoder of one generation, and all that they must hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from draftkit.doctor.findings import Finding
from draftkit.doctor.pair import Pair
from draftkit.draft.checkpoint import shape_of
from draftkit.draft.checkpoint_files import CONFIG
from draftkit.draft.deepseek_v4_checkpoint import BUNDLED
from draftkit.draft.deepseek_v4_checks import check_checkpoint, check_pair, check_settings
from draftkit.draft.deepseek_v4_shape import DeepseekV4Shape
from draftkit.errors import CheckpointError

_COSTS = {
    "checkpoint": "engines refuse it, or run it without its module",
    "generation": "nearly all acceptance, without an error",
    "encoder": "acceptance, and the quality of the answers",
}


def check_deepseek_v4(pair: Pair, switches: dict[str, Any]) -> list[Finding]:
    """All findings of this family; no model is loaded."""
    target, bundled = pair.target.info.name, _architecture(pair) == BUNDLED
    folders = [Path(target)] if Path(target).is_dir() else []
    if bundled and pair.folder.resolve() not in [folder.resolve() for folder in folders]:
        folders.append(pair.folder)
    told = [("checkpoint", line) for folder in folders for line in check_checkpoint(folder)]
    made_for = str(pair.folder) if bundled else pair.note.get("target")
    told += [("generation", line) for line in check_pair(target, made_for)]
    told += [("encoder", line) for line in _settings(pair, switches)]
    return [_finding(check, line) for check, line in told]


def _architecture(pair: Pair) -> str:
    return str((pair.raw.get("architectures") or [""])[0])


def _settings(pair: Pair, switches: dict[str, Any]) -> Iterator[str]:
    try:
        shape = shape_of(pair.raw, str(pair.folder / CONFIG), pair.target.info.num_layers)
    except CheckpointError:
        return  # told of the checkpoint, or by the load
    if isinstance(shape, DeepseekV4Shape):
        yield from check_settings(shape, pair.target.info.name, None, switches)


def _finding(check: str, line: str) -> Finding:
    """A line ends with what to do, after its last semicolon."""
    what, _, mend = line.rpartition("; ")
    return Finding(check, what or line, _COSTS[check], mend if what else "copy the checkpoint again")

"""DeepSeek-V4 in files: checkpoint, module and encoder of one generation, and all that they must hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftkit.artefact import read_json
from draftkit.doctor.findings import Finding
from draftkit.doctor.pair import Pair
from draftkit.draft.deepseek_v4_checkpoint import BUNDLED
from draftkit.errors import CheckpointError, TargetError
from draftkit.target.deepseek_v4 import Shards, is_draft
from draftkit.target.deepseek_v4_check import mismatches
from draftkit.target.deepseek_v4_encoder import generation
from draftkit.target.deepseek_v4_tensors import FAMILY, checkpoint_tensors, has_draft_module
from draftkit.target.loading import OTHER_FAMILIES
from draftkit.target.shards import tensor_places

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
    told += [("encoder", line) for line in check_encoder(target, switches)]
    return [_finding(check, line) for check, line in told]


def _architecture(pair: Pair) -> str:
    return str((pair.raw.get("architectures") or [""])[0])


def _finding(check: str, line: str) -> Finding:
    """A line ends with what to do, after its last semicolon."""
    what, _, mend = line.rpartition("; ")
    return Finding(check, what or line, _COSTS[check], mend if what else "copy the checkpoint again")


# Each check says in one line what was found and what to do; nothing found is an empty list.


def check_checkpoint(folder: Path) -> list[str]:
    """Another generation's checkpoint, a missing module, shards, tensors and scales."""
    raw: dict[str, Any] = read_json(folder / "config.json", CheckpointError)
    kind = raw.get("model_type")
    if kind in OTHER_FAMILIES:
        return [f"{folder}: is {OTHER_FAMILIES[str(kind)]}; its module and settings do not transfer"]
    if kind != FAMILY:
        return [f"{folder}: model_type is {kind!r}, no DeepSeek-V4 checkpoint"]
    found = []
    if not has_draft_module(raw):
        found.append(
            f"{folder}: has no dspark_* keys: a preview checkpoint, whose mtp.* is a classic MTP layer; "
            "serve it with method mtp, or take the checkpoint with DSpark"
        )
    try:
        shards = Shards(str(folder), tensor_places(str(folder)))
    except (TargetError, OSError) as error:
        return [*found, str(error)]
    wanted = checkpoint_tensors(raw)
    there = {n: t for n, t in shards.found.items() if has_draft_module(raw) or not is_draft(n)}
    renamed = sorted(n for n in there if n.endswith(("markov_head.embed.weight", "markov_head.head.weight")))
    if renamed:
        found.append(f"{folder}: {renamed[0]} is DeepSeek-V4.1's name; this module belongs to another model")
    return found + [f"{folder}: {what}" for what in mismatches(wanted, there)]


def check_pair(target: str, drafter_made_for: str | None) -> list[str]:
    """A module of preview weights before an official target, or the other way round: nothing fails,
    acceptance collapses."""
    there, own = generation(target), generation(drafter_made_for or "")
    if there and own and there != own:
        return [
            f"{target}: is of the {there} weights, the module was made for {drafter_made_for} ({own}); "
            "acceptance collapses, take the module of the same release"
        ]
    return []


def check_encoder(target: str, switches: Mapping[str, Any]) -> list[str]:
    """The encoder of the other generation."""
    encoder, there = switches.get("encoder"), generation(target)
    if encoder and there and encoder != there:
        return [f"encoder {encoder}: {target} was trained with the {there} one; leave the switch out"]
    return []

"""What goes wrong with a DeepSeek-V4 checkpoint and its module in practice, found without loading a model.

Each check says in one line what was found and what to do; nothing found is an empty list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftkit.artefact import read_json
from draftkit.draft.deepseek_v4_shape import DeepseekV4Shape
from draftkit.errors import CheckpointError, TargetError
from draftkit.target.deepseek_v4 import Shards
from draftkit.target.deepseek_v4_check import mismatches
from draftkit.target.deepseek_v4_prompts import generation
from draftkit.target.deepseek_v4_tensors import FAMILY, checkpoint_tensors, has_draft_module
from draftkit.target.loading import OTHER_FAMILIES
from draftkit.target.shards import tensor_places


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
    there = {n: t for n, t in shards.found.items() if has_draft_module(raw) or not n.startswith("mtp.")}
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


def check_settings(
    config: DeepseekV4Shape,
    target: str,
    drafted: int | None = None,
    switches: Mapping[str, Any] | None = None,
) -> list[str]:
    """More drafted tokens than the block has positions, and the encoder of the other generation."""
    found = []
    if drafted is not None and drafted > config.gamma:
        found.append(
            f"{drafted} drafted tokens: the module has a block of {config.gamma} and was never trained for "
            f"more; draft {config.gamma}"
        )
    encoder, there = (switches or {}).get("encoder"), generation(target)
    if encoder and there and encoder != there:
        found.append(f"encoder {encoder}: {target} was trained with the {there} one; leave the switch out")
    return found

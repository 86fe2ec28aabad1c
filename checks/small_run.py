"""A run of all stages in a minute, for the checks beside this file: commands, where each writes, and how each
is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftkit.data.conversations import read_conversations
from draftkit.data.records import read_manifest
from draftkit.draft.checkpoint import load_drafter
from draftkit.draft.checkpoint_files import read_provenance
from draftkit.features.store import FeatureStore
from draftkit.schedule.calibration import load_calibration
from draftkit.schedule.step_rate_table import load_step_rate
from draftkit.target.fingerprint import fingerprint
from draftkit.target.loading import load_target
from draftkit.target.place import EMBEDDED
from draftkit.train.folder import read_folder

SMALL = ["-r", "tiny-quickstart", "--set", "generate.max_new_tokens=24", "--set", "generate.batch_size=8"]
QUICK = ["--tokens", "1", "--tokens", "8", "--repeats", "1"]
STEPS = ["--set", "train.steps=60", "--set", "train.validate_every=10"]


@dataclass(frozen=True)
class Stage:
    """A command, and the folder or file that it writes."""

    name: str
    command: list[str]
    out: Path


def stages(work: Path, prompts: int = 48) -> list[Stage]:
    """The stages of a small run in `work`, in order; makes the file of prompts."""
    work.mkdir(parents=True, exist_ok=True)
    lines = (EMBEDDED / "prompts.jsonl").read_text("utf-8").splitlines()[:: max(1, 2000 // prompts)][:prompts]
    (work / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    asked, answers, features, drafter = (
        work / "prompts.jsonl",
        work / "answers.jsonl",
        work / "features",
        work / "drafter",
    )
    best, calibration, rate = drafter / "best", work / "calibration", work / "step_rate.json"
    return [
        Stage("generate", ["generate", *SMALL, "-p", str(asked), "-o", str(answers)], answers),
        Stage("capture", ["capture", *SMALL, "-c", str(answers), "-o", str(features)], features),
        Stage("train", ["train", *SMALL, *STEPS, "-f", str(features), "-o", str(drafter)], drafter),
        Stage(
            "calibrate",
            ["calibrate", *SMALL, "-d", str(best), "-p", str(asked), "-o", str(calibration)],
            calibration,
        ),
        Stage("profile", ["profile", *QUICK, "-d", str(best), "-o", str(rate)], rate),
    ]


def readers(work: Path) -> dict[Path, Callable[[], Any]]:
    """How the stages read each file of a finished run: something to compare, or a DraftkitError."""
    features, drafter, best = work / "features", work / "drafter", work / "drafter" / "best"
    target = load_target("tiny")
    own, gamma = fingerprint(best), load_drafter(best, target=target).gamma

    def weights() -> list[Any]:
        return [load_drafter(best, target=target).state_dict(), read_provenance(best)]

    def store() -> list[Any]:
        opened = FeatureStore(features)
        return [vars(opened[i]) for i in range(len(opened))]

    found: dict[Path, Callable[[], Any]] = {
        work / "answers.jsonl": lambda: [vars(c) for c in read_conversations([work / "answers.jsonl"])],
        work / "answers.manifest.json": lambda: read_manifest(work / "answers.jsonl"),
        features / "manifest.json": store,
        features / "index-000.jsonl": store,
        work / "calibration" / "calibration.json": lambda: load_calibration(
            work / "calibration/calibration.json", gamma, own
        ),
        work / "step_rate.json": lambda: load_step_rate(work / "step_rate.json"),
        best / "config.json": weights,
        best / "draftkit.json": weights,
        best / "model.safetensors": weights,
    }
    found |= dict.fromkeys(features.glob("shard-*.bin"), store)
    states = [path.parent for path in drafter.rglob("position.json")]
    for state in states:
        found |= dict.fromkeys(
            (state / "position.json", state / "state.safetensors"), lambda state=state: read_folder(state)
        )
    return found


def told(value: Any) -> str:
    """A text that is the same for what is the same; tensors count by all their bytes."""
    if isinstance(value, torch.Tensor):
        return str((value.dtype, value.shape, hash(value.reshape(-1).view(torch.uint8).numpy().tobytes())))
    if isinstance(value, dict):
        return json.dumps({str(k): told(v) for k, v in value.items()}, sort_keys=True)
    if isinstance(value, list | tuple):
        return json.dumps([told(v) for v in value])
    return repr(value)

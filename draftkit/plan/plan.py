"""What a recipe will take before anything runs: bytes, hours and memory of each stage, and the way to take.

Sizes come from the target's configuration; weights are not needed. Bytes are counted. Hours are a floor that
nobody reaches, divided by the share of it that long runs reach: floating-point operations over the rate at
which this device multiplies matrices, which is measured here. Memory is added up from the tensors that a
stage holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draftkit.config import Recipe
from draftkit.data.conversations import iterate_conversations
from draftkit.errors import FeatureStoreError
from draftkit.features.estimate import TokenCounts, assumed_counts, counted
from draftkit.features.record import NO_FEATURES, RecordForm
from draftkit.features.writer import SPARE_BYTES
from draftkit.plan.drafter import DrafterSizes
from draftkit.plan.target import matrix_rate, reading_bytes, target_sizes
from draftkit.stages import prompt_format
from draftkit.target.deepseek_v4_tensors import FAMILY
from draftkit.target.loading import best_device
from draftkit.target.place import deepseek_v4_switches
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import DTYPES

REACHED = 0.4  # of the measured rate, by passes of a whole model
GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes; hours on all devices together, memory of each."""

    stage: str
    disk_bytes: int
    hours: float
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """Stages, ways to features and the recommended one: its name, its commands, and why."""

    counts: TokenCounts
    bytes_per_token: dict[str, float]
    stages: tuple[StagePlan, ...]
    free_bytes: int
    fits: bool  # the store that the recipe asks for, on this disk
    way: str
    why: str
    device: str
    devices: int
    tflops: float  # of one of them
    measured: bool  # or what was said
    experts_apart: int  # parameters of a mixture's experts, which the devices share out

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan(
    recipe: Recipe,
    conversations: Sequence[Path],
    assumed: tuple[int, int, float],
    out: Path,
    devices: int = 1,
    tflops: float | None = None,
) -> Plan:
    """The plan of a recipe on files of conversations, or on so many conversations of so many tokens with such
    a share of answers, for so many devices of `tflops` each (None: of what is measured on this one). Raises
    TargetError when the configuration is not there."""
    sizes = target_sizes(recipe.target.path, recipe.target.revision, recipe.target.dtype)
    capture, train = recipe.capture, recipe.train
    if conversations:
        tokenizer = load_tokenizer(recipe.target.path, recipe.target.revision)
        switches = deepseek_v4_switches(recipe.target)
        total = sum(1 for _ in iterate_conversations(conversations, None, switches))
        shown = prompt_format(recipe, tokenizer)
        counts = counted(
            iterate_conversations(conversations, None, switches), total, shown, sizes.info, capture
        )
    else:
        counts = assumed_counts(*assumed, capture.max_length)
    layers = len(recipe.drafter.feature_layers or ()) or recipe.drafter.num_features
    size_of = {
        dtype: counts.store_bytes(RecordForm(dtype, layers, sizes.info.hidden_size))
        for dtype in ("float32", "bfloat16", "fp8", NO_FEATURES)
    }
    free = max(0, shutil.disk_usage(_there(out)).free - SPARE_BYTES)
    device = best_device()
    rate = 1e12 * tflops if tflops else matrix_rate(device, DTYPES[recipe.target.dtype])
    hours = lambda operations: operations / (devices * rate * REACHED) / 3600  # noqa: E731
    reading = 2.0 * sizes.active * counts.read
    epochs = train.epochs if train.steps is None else train.steps * train.batch_size / max(1, counts.samples)
    shape = DrafterSizes.of(recipe, sizes, layers)
    step_memory = shape.train_bytes(recipe, counts, layers, devices)
    # a V4 target lies over all devices, in vLLM as it is stored; of others every process has its own
    v4 = sizes.info.family == FAMILY
    served = sizes.weight_bytes // (devices if v4 else 1)
    read_memory = reading_bytes(recipe, sizes, layers, devices)
    learning = shape.operations(recipe, counts, layers) * epochs
    stages = (
        StagePlan("generate", round(8 * counts.read), hours(2.0 * sizes.active * counts.targets),
                  served),
        StagePlan("capture", size_of[capture.dtype], hours(reading), read_memory),
        StagePlan("train from the store", shape.disk_bytes(recipe), hours(learning), step_memory),
        StagePlan("train live", size_of[NO_FEATURES] + shape.disk_bytes(recipe),
                  hours(learning + reading * epochs),
                  step_memory + (served if v4 else read_memory)),
    )  # fmt: skip
    fits = size_of[capture.dtype] <= free
    way, why = _way(capture.dtype, size_of, free, epochs)
    per_token = {name: value / max(1, counts.read) for name, value in size_of.items()}
    per_token["live"] = per_token.pop(NO_FEATURES)
    apart = shape.layers * shape.experts if devices > 1 and train.shard else 0
    return Plan(
        counts,
        per_token,
        stages,
        free,
        fits,
        way,
        why,
        device,
        devices,
        rate / 1e12,
        tflops is None,
        apart,
    )


def lines(made: Plan) -> list[str]:
    """The plan as a table."""
    counts = made.counts
    found = [
        f"{counts.conversations:,.0f} conversations, {counts.samples:,.0f} samples, {counts.read:,.0f} "
        f"tokens, {counts.targets:,.0f} of them written by the target",
        f"{'stage':22} {'disk GiB':>12} {'hours':>10} {'memory GiB':>12}",
    ]
    for stage in made.stages:
        disk, memory = stage.disk_bytes / GIB, stage.memory_bytes / GIB
        found.append(f"{stage.stage:22} {disk:12,.2f} {stage.hours:10,.2f} {memory:12,.2f}")
    per_token = ", ".join(f"{name} {value:,.0f}" for name, value in made.bytes_per_token.items())
    found.append(f"bytes per token: {per_token}")
    for_whom = f"one {made.device}" if made.devices == 1 else f"each of {made.devices} devices"
    rate = f"{made.tflops:,.2f} TFLOP/s of matrix products " + ("measured here" if made.measured else "given")
    found.append(
        f"hours and memory: estimates for {for_whom}, at {REACHED:.0%} of the {rate}; bytes are counted"
    )
    if made.experts_apart:
        found.append(
            f"experts: {made.experts_apart:,} weights stay apart, {made.experts_apart // made.devices:,} on "
            "each device"
        )
    found.append(f"free on this disk: {made.free_bytes / GIB:,.1f} GiB")
    return [*found, f"recommended: {made.way} ({made.why})"]


def refuse(made: Plan, dtype: str) -> FeatureStoreError:
    """The error for a store that the disk cannot hold, with what would fit."""
    needed = made.stages[1].disk_bytes
    share = made.free_bytes / max(1, needed)
    free = f"{made.free_bytes / GIB:,.1f} GiB are free"
    return FeatureStoreError(
        f"a store in {dtype} needs {needed / GIB:,.1f} GiB, {free}; what fits: {made.way}, or "
        f"{int(share * made.counts.conversations):,} of {int(made.counts.conversations):,} "
        f"conversations"
    )


def _way(dtype: str, size_of: dict[str, int], free: int, epochs: float) -> tuple[str, str]:
    keep = "draftkit train -f features -c answers.jsonl"
    if epochs <= 1 and size_of[NO_FEATURES] <= free:
        return "live", "one epoch reads each conversation once, a store would be read once, too"
    if size_of[dtype] <= free:
        return f"hybrid: {keep}", "the store fits; the first epoch fills it, the others read it"
    if size_of["fp8"] <= free:
        return f"hybrid with --set capture.dtype=fp8: {keep}", "a store fits in fp8 alone"
    if size_of[NO_FEATURES] <= free:
        return "live: draftkit train -c answers.jsonl", "no store fits; the target reads in every epoch"
    return "fewer conversations", "not even the texts fit"


def _there(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path

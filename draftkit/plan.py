"""What a recipe will take before anything runs: bytes, hours and memory of each stage, and the way to take.

Sizes come from the target's configuration; weights are not needed. Bytes are counted. Hours are a floor that
nobody reaches, divided by the share of it that long runs reach: floating-point operations over the rate at
which this device multiplies matrices, which is measured here. Memory is added up from the tensors that a
stage holds.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from draftkit.config import Recipe
from draftkit.data.conversations import iterate_conversations
from draftkit.draft.algorithms import algorithm_named
from draftkit.draft.families import block_shape, style_of
from draftkit.draft.losses import CHUNK_LOGITS
from draftkit.errors import FeatureStoreError, TargetError
from draftkit.features.estimate import TokenCounts, assumed_counts, counted
from draftkit.features.record import NO_FEATURES, RecordForm
from draftkit.features.writer import SPARE_BYTES
from draftkit.stages import prompt_format
from draftkit.target.interface import TargetInfo
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import DTYPES, best_device, longest_context, resolve_target

REACHED = 0.4  # of the measured rate, by passes of a whole model
GIB = 2**30


@dataclass(frozen=True)
class TargetSizes:
    """What a target's configuration says; `active` parameters take part in one token's pass."""

    info: TargetInfo
    text_config: Any
    parameters: int
    active: int
    weight_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes; hours and memory of one device."""

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
    measured_tflops: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan(
    recipe: Recipe,
    conversations: Sequence[Path],
    assumed: tuple[int, int, float],
    out: Path,
) -> Plan:
    """The plan of a recipe on files of conversations, or on so many conversations of so many tokens with such
    a share of answers. Raises TargetError when the configuration is not there."""
    sizes = target_sizes(recipe.target.path, recipe.target.revision, recipe.target.dtype)
    capture, train = recipe.capture, recipe.train
    if conversations:
        tokenizer = load_tokenizer(recipe.target.path, recipe.target.revision)
        total = sum(1 for _ in iterate_conversations(conversations))
        shown = prompt_format(recipe, tokenizer)
        counts = counted(iterate_conversations(conversations), total, shown, sizes.info, capture)
    else:
        counts = assumed_counts(*assumed, capture.max_length)
    layers = len(recipe.drafter.feature_layers or ()) or recipe.drafter.num_features
    size_of = {
        dtype: counts.store_bytes(RecordForm(dtype, layers, sizes.info.hidden_size))
        for dtype in ("float32", "bfloat16", "fp8", NO_FEATURES)
    }
    free = max(0, shutil.disk_usage(_there(out)).free - SPARE_BYTES)
    device = best_device()
    rate = matrix_rate(device, DTYPES[recipe.target.dtype])
    hours = lambda operations: operations / (rate * REACHED) / 3600  # noqa: E731
    reading = 2.0 * sizes.active * counts.read
    epochs = train.epochs if train.steps is None else train.steps * train.batch_size / max(1, counts.samples)
    shape = DrafterSizes.of(recipe, sizes, layers)
    step_memory = shape.train_bytes(recipe, counts, layers)
    learning = shape.operations(recipe, counts, layers) * epochs
    stages = (
        StagePlan("generate", round(8 * counts.read), hours(2.0 * sizes.active * counts.targets),
                  sizes.weight_bytes),
        StagePlan("capture", size_of[capture.dtype], hours(reading), _reading_bytes(recipe, sizes, layers)),
        StagePlan("train from the store", shape.disk_bytes(recipe), hours(learning), step_memory),
        StagePlan("train live", size_of[NO_FEATURES] + shape.disk_bytes(recipe),
                  hours(learning + reading * epochs),
                  step_memory + _reading_bytes(recipe, sizes, layers)),
    )  # fmt: skip
    fits = size_of[capture.dtype] <= free
    way, why = _way(capture.dtype, size_of, free, epochs)
    per_token = {name: value / max(1, counts.read) for name, value in size_of.items()}
    per_token["live"] = per_token.pop(NO_FEATURES)
    return Plan(counts, per_token, stages, free, fits, way, why, device, rate / 1e12)


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
    found.append(
        f"hours and memory: estimates for one {made.device}, at {REACHED:.0%} of the "
        f"{made.measured_tflops:,.2f} TFLOP/s of matrix products measured here; bytes are counted"
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


@dataclass(frozen=True)
class DrafterSizes:
    """Parameters of a drafter: those of one decoder layer, of all that learns, and of embedding and head."""

    layer: int
    trained: int
    frozen: int
    layers: int
    hidden: int
    vocab: int
    key_values: int  # numbers of keys and values that a layer makes of a context token

    @classmethod
    def of(cls, recipe: Recipe, sizes: TargetSizes, features: int) -> DrafterSizes:
        """Of the recipe's drafter for a target."""
        section, algorithm = recipe.drafter, algorithm_named(recipe.drafter.algorithm)
        hidden, vocab = sizes.info.hidden_size, sizes.info.vocab_size
        try:
            automatic = algorithm.style or style_of(sizes.info.family)
            shape = block_shape(sizes.text_config, automatic if section.style == "auto" else section.style)
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise TargetError(f"{sizes.info.name}: its drafter's shape is not known ({error})") from error
        width = shape.num_heads * shape.head_dim
        key_values = 2 * shape.num_kv_heads * shape.head_dim
        inner = section.intermediate_size or shape.intermediate_size
        layer = 2 * hidden * width + hidden * key_values + 3 * hidden * inner
        layers = section.num_layers or algorithm.layers
        rank = 2 * vocab * section.markov_rank if section.head != "none" and algorithm.masks else 0
        trained = layers * layer + features * hidden * hidden + rank
        return cls(layer, trained, 2 * vocab * hidden, layers, hidden, vocab, key_values)

    def operations(self, recipe: Recipe, counts: TokenCounts, features: int) -> float:
        """Floating-point operations of one epoch, forward and backward."""
        blocks = min(recipe.train.anchors * counts.samples, counts.targets)
        drafted = blocks * recipe.drafter.block_size
        context = counts.context * (features * self.hidden**2 + self.layers * self.hidden * self.key_values)
        heads = 4 * self.vocab * self.hidden  # draft logits forward, two gradients; the target's forward
        return 6 * (drafted * self.layers * self.layer + context) + 2 * drafted * heads

    def train_bytes(self, recipe: Recipe, counts: TokenCounts, features: int) -> int:
        """Device memory of a training step."""
        train = recipe.train
        weight = 2 if train.dtype == "bfloat16" else 4
        # parameters, gradients and two moments in float32; copies that the passes see
        fixed = self.trained * (16 + (weight if weight == 2 else 0)) + self.frozen * 4
        mean = counts.context / max(1, counts.samples)
        tokens = max(train.row_tokens or 0, mean) * (train.micro_batch_size or train.batch_size)
        batch = tokens * (features + 1) * self.hidden * (4 if recipe.capture.dtype == "float32" else 2)
        per_row = min(train.anchors, counts.targets / max(1, counts.samples)) * recipe.drafter.block_size
        drafted = per_row * max(1, tokens / max(1, mean))
        kept = drafted * self.layers * (16 * self.hidden) * weight + tokens * 4 * self.hidden * weight
        return round(fixed + batch + kept + 4 * CHUNK_LOGITS * 4)

    def disk_bytes(self, recipe: Recipe) -> int:
        """The state, and bfloat16 drafters: the best, the last and the numbered ones."""
        saved = 2 * (self.trained + self.frozen)
        return 12 * self.trained + (2 + recipe.train.keep_checkpoints) * saved


def target_sizes(path: str, revision: str | None, dtype: str) -> TargetSizes:
    """What a target's configuration says; a folder that holds `config.json` alone will do. Raises TargetError
    when there is none, or of a family without a skeleton."""
    folder = Path(path)
    source = path if (folder / "config.json").is_file() else resolve_target(path)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        line = str(error).splitlines()[0]
        raise TargetError(f"{path}: its configuration cannot be read: {line}") from error
    text = config.get_text_config()
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and "shared" not in n)
    whole = sum(p.numel() for p in model.parameters())
    count = next((c for n in ("n_routed_experts", "num_local_experts", "num_experts")
                  if (c := getattr(text, n, None))), 0)  # fmt: skip
    chosen = getattr(text, "num_experts_per_tok", 0) or 0
    active = whole - experts + (experts * chosen // count if count else experts)
    info = TargetInfo(
        path, revision, "", int(text.vocab_size), int(text.hidden_size), int(text.num_hidden_layers), (),
        longest_context(text), str(text.model_type),
    )  # fmt: skip
    return TargetSizes(info, text, whole, active, whole * DTYPES[dtype].itemsize)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of large matrix products on a device, the best of a few."""
    size = 4096 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        for _ in range(3):
            a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begun) / 3)
    return 2 * size**3 / best


def _reading_bytes(recipe: Recipe, sizes: TargetSizes, layers: int) -> int:
    """The weights, and what one batch's pass holds: features, last hidden states, a layer's inner states."""
    text, item = sizes.text_config, DTYPES[recipe.target.dtype].itemsize
    inner = getattr(text, "intermediate_size", None) or 4 * sizes.info.hidden_size
    tokens = max(recipe.capture.batch_tokens, recipe.capture.max_length)
    return sizes.weight_bytes + tokens * ((layers + 8) * sizes.info.hidden_size + 3 * int(inner)) * item


def _there(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path

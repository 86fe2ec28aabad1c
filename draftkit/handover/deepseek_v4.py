"""A DSpark module handed over to vLLM and SGLang: into a DeepSeek-V4 checkpoint, or into a `dspark/` folder
beside it.

Weights are written as DeepSeek releases them, in FP8 and packed FP4, where the checkpoint is quantised. Files
that are there are never written to: shards are added, and the index changes in one rename at the end. A shard
that holds old tensors of a draft module among others has its others copied into an added one, because vLLM
reads whole files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draftkit.artefact import read_json
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.deepseek_v4 import DeepseekV4Drafter
from draftkit.draft.deepseek_v4_checkpoint import draft_fields, place_of
from draftkit.draft.deepseek_v4_shape import DeepseekV4Shape
from draftkit.errors import CheckpointError, ConfigError
from draftkit.handover.engines import engine_named
from draftkit.output import make_folder, write_tensors, write_text
from draftkit.target.deepseek_v4 import is_draft
from draftkit.target.deepseek_v4_tensors import FAMILY, TensorSpec, draft_tensors
from draftkit.target.fp8_fp4 import quantise_fp4, quantise_fp8
from draftkit.target.weights import TargetFiles

BUNDLED, SUBFOLDER = "bundled", "dspark"  # forms of `draftkit export`
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SHARD_BYTES = 4 * 10**9
_FLOATS = {"BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class HandedOver:
    """What was written: files that were added, and bytes of the module."""

    folder: Path
    added: tuple[str, ...]
    bytes: int


def write_bundled(drafter: DeepseekV4Drafter, folder: Path) -> HandedOver:
    """Put the module under `mtp.*` of the V4 checkpoint in `folder`, in the place of one that is there.

    Raises CheckpointError when the folder holds no sharded V4 checkpoint, or one of another shape.
    """
    raw = target_config(folder, drafter.config)
    index = read_json(folder / INDEX, CheckpointError)
    places: dict[str, str] = dict(index.get("weight_map") or {})
    stale = {file for name, file in places.items() if is_draft(name)}
    mixed = sorted(stale & {file for name, file in places.items() if not is_draft(name)})
    kept = {name: file for name, file in places.items() if not is_draft(name)}
    added: dict[str, str] = {}
    for file in mixed:
        added |= _copied_without_draft(folder, file, kept)
    config = with_module(raw, drafter.config)
    module = write_shards(drafter, config, folder)
    if config != raw:
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    whole = kept | added | module.places
    about = {**(index.get("metadata") or {}), "total_size": _bytes_of(folder, whole)}
    write_text(folder / INDEX, json.dumps({"metadata": about, "weight_map": whole}, indent=1) + "\n")
    files = sorted({*added.values(), *module.places.values()})
    return HandedOver(folder, tuple(files), module.bytes)


def write_subfolder(drafter: DeepseekV4Drafter, folder: Path) -> HandedOver:
    """Write `folder/dspark`, which SGLang finds by itself: the target's configuration and the module's
    shards.

    Raises CheckpointError as `write_bundled` does.
    """
    raw = target_config(folder, drafter.config)
    out = folder / SUBFOLDER
    make_folder(out)
    config = with_module(raw, drafter.config)
    module = write_shards(drafter, config, out)
    write_text(out / CONFIG, json.dumps(config, indent=2) + "\n")
    about = {"metadata": {"total_size": module.bytes}, "weight_map": module.places}
    write_text(out / INDEX, json.dumps(about, indent=1) + "\n")
    return HandedOver(out, tuple(sorted(set(module.places.values()))), module.bytes)


def commands(path: str, config: DeepseekV4Shape) -> dict[str, str]:
    """How each engine of the table (`handover/engines.py`) serves the checkpoint with its module."""
    gamma = config.gamma
    spec = {"method": "dspark", "num_speculative_tokens": gamma, "draft_sample_method": "probabilistic"}
    return {
        "vllm": f"vllm serve {path} --trust-remote-code --kv-cache-dtype fp8 --block-size 256 "
        "--tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 --enable-auto-tool-choice "
        f"--reasoning-parser deepseek_v4 --speculative-config '{json.dumps(spec, separators=(',', ':'))}'",
        "sglang": f"sglang serve --trust-remote-code --model-path {path} --speculative-algorithm DSPARK "
        f"--speculative-dspark-block-size {gamma} --speculative-num-draft-tokens {gamma + 1} "
        "--reasoning-parser deepseek-v4 --tool-call-parser deepseekv4",
        "llama.cpp": "llama-server -m target.gguf -md dspark.gguf --spec-type draft-dspark "
        f"--spec-draft-n-max {gamma} --fit off",
    }


def instructions(path: str, config: DeepseekV4Shape) -> list[str]:
    """The commands with the versions that they were read in, and what they leave unsaid."""
    told = []
    for name, line in commands(path, config).items():
        engine = engine_named(name)
        told += [f"{name} ({engine.checked}): {line}", *(f"  {n}" for n in engine.all_notes(config))]
    again = (
        "where the checkpoint is quantised the module is too: measure it again with `draftkit evaluate -d`"
    )
    return [
        *told,
        f"note: draft {config.gamma} tokens, the block size that it was trained with",
        f"note: {again}",
    ]


def hand_over_module(folder: Path, out: Path, form: str) -> HandedOver:
    """Write the module in `folder` into the checkpoint in `out` (BUNDLED) or beside it (SUBFOLDER), and print
    how it is served. Raises ConfigError for another kind of drafter."""
    drafter = open_drafter(folder, TargetFiles(str(out)), torch.float32)
    if not isinstance(drafter, DeepseekV4Drafter):
        raise ConfigError(f"--form {form}: is for dspark_v4 drafters; {folder} is {drafter.config.algorithm}")
    made = (write_bundled if form == BUNDLED else write_subfolder)(drafter, out)
    print("\n".join(instructions(str(out), drafter.config)), file=sys.stderr)
    return made


# --- the files


@dataclass(frozen=True)
class Written:
    """Where each tensor of the module lies, and their bytes."""

    places: dict[str, str]
    bytes: int


def target_config(folder: Path, config: DeepseekV4Shape) -> dict[str, Any]:
    """The checkpoint's `config.json`, which must be of this drafter's target."""
    if not (folder / INDEX).exists() or not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder}: has no {INDEX} or no {CONFIG}; give the folder of the sharded DeepSeek-V4 checkpoint"
        )
    raw: dict[str, Any] = read_json(folder / CONFIG, CheckpointError)
    if raw.get("model_type") != FAMILY:
        raise CheckpointError(
            f"{folder}: is a {raw.get('model_type')} checkpoint; this drafter belongs to DeepSeek-V4"
        )
    own = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_target_layers,
        "vocab_size": config.vocab_size,
        "n_routed_experts": config.num_experts,
        "moe_intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "head_dim": config.head_dim,
    }
    for name, value in own.items():
        if raw.get(name) != value:
            raise CheckpointError(
                f"{folder}: {name} is {raw.get(name)}, the drafter's is {value}; give its own target"
            )
    return raw


def with_module(raw: dict[str, Any], config: DeepseekV4Shape) -> dict[str, Any]:
    """The configuration that says which module there is; as it was where it says so already."""
    wanted = draft_fields(config)
    if raw.get("n_mtp_layers") is None:
        del wanted["n_mtp_layers"]  # DeepSeek's files say it by the length of compress_ratios
    changed = raw | wanted
    ratios, layers = raw.get("compress_ratios"), config.num_target_layers
    if isinstance(ratios, list):
        changed["compress_ratios"] = [*ratios[:layers], *[0] * config.num_layers]
    else:
        changed["n_mtp_layers"] = config.num_layers
    return changed


def _stored(drafter: DeepseekV4Drafter, raw: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The module's tensors as they lie in a file of this configuration."""
    state, quantised = drafter.state_dict(), raw.get("quantization_config") is not None
    fp4 = raw.get("expert_dtype", "fp4") == "fp4"
    for name, spec in draft_tensors(raw).items():
        if name.endswith(".scale"):
            continue
        place = place_of(name)
        value = place.part_of(state[place.name]).detach().cpu()
        if not quantised or spec.dtype in _FLOATS:
            yield name, value.to(_plain_type(spec)).contiguous()
            continue
        quantise = quantise_fp4 if spec.dtype == "I8" and fp4 else quantise_fp8
        weight, scale = quantise(value)
        yield name, weight.contiguous()
        yield name.removesuffix("weight") + "scale", scale.contiguous()


def _plain_type(spec: TensorSpec) -> torch.dtype:
    return _FLOATS.get(spec.dtype, torch.bfloat16)


def write_shards(drafter: DeepseekV4Drafter, raw: dict[str, Any], folder: Path) -> Written:
    """Files of at most SHARD_BYTES, each whole before it has its name."""
    places: dict[str, str] = {}
    part: dict[str, Tensor] = {}
    total = held = number = 0
    first = _free_number(folder)

    def flush() -> None:
        nonlocal part, held, number
        file = f"model-dspark-{first + number:05d}.safetensors"
        _write(folder / file, part)
        places.update(dict.fromkeys(part, file))
        part, held, number = {}, 0, number + 1

    for name, tensor in _stored(drafter, raw):
        size = tensor.numel() * tensor.element_size()
        if part and held + size > SHARD_BYTES and not name.endswith(".scale"):
            flush()
        part[name] = tensor
        total, held = total + size, held + size
    flush()
    return Written(places, total)


def _copied_without_draft(folder: Path, file: str, kept: dict[str, str]) -> dict[str, str]:
    """The target's tensors of a shard that holds a draft module's too, in a file of their own."""
    names = [name for name, where in kept.items() if where == file]
    copy = file.removesuffix(".safetensors") + "-target.safetensors"
    try:
        with safe_open(folder / file, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / file}: is damaged ({error}); copy it again") from error
    _write(folder / copy, tensors)
    return dict.fromkeys(names, copy)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    write_tensors(partial, tensors, save_file, {"format": "pt"})
    partial.replace(path)


def _free_number(folder: Path) -> int:
    """After those of an earlier hand-over, which the index may still name."""
    taken = [int(p.stem.split("-")[-1]) for p in folder.glob("model-dspark-*.safetensors")]
    return max(taken, default=0) + 1


def _bytes_of(folder: Path, places: dict[str, str]) -> int:
    return sum((folder / file).stat().st_size for file in set(places.values()))

"""Whether the sizes that a target's configuration names can be those of its weights, from the headers of the
files and before anything of these sizes is made. Imports neither PyTorch nor Transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from draftkit.errors import TargetError
from draftkit.target.device import memory_bytes

# Names that families, and GGUF files, have for a count of parts with a tensor each, and for a side of one.
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "block_count")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "expert_count")
SIDES = ("hidden_size", "n_embd", "d_model", "vocab_size", "embedding_length")
_INNER = ("intermediate_size", "moe_intermediate_size", "n_inner")
_PACKED = 16  # numbers that one of a quantised tensor may hold at most
_LACKING = 2  # times what a folder holds: less is told by the names of what is missing
_DESCRIBED = 8192  # bytes that a layer, or an expert of one, takes at least when it is described alone
_LENGTH = 8  # bytes before a safetensors header, which say how long it is
_ADVICE = "correct it, or copy the checkpoint again"


@dataclass(frozen=True)
class Held:
    """What files of weights hold: tensors, the longest side of one, and numbers in all."""

    tensors: int
    longest: int
    numbers: int


def held_by(files: Iterable[Path]) -> Held | None:
    """By the headers of safetensors files. None where there is no file, or one is damaged, which whoever
    loads it says."""
    try:
        shapes = [shape for file in files for shape in _shapes(file)]
        sides = [side for shape in shapes for side in shape]
        return Held(len(shapes), max(sides), sum(map(prod, shapes))) if sides else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def held_in(folder: Path) -> Held | None:
    """The same of the safetensors files in a folder."""
    return held_by(sorted(folder.glob("*.safetensors")))


def _shapes(file: Path) -> Iterator[list[int]]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file} is cut off")
        header = json.loads(opened.read(length))
    yield from (about["shape"] for name, about in header.items() if name != "__metadata__")


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a configuration's text model."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) and part else config


def check_counts(name: str, config: Mapping[str, Any], held: Held | None, where: str = "config.json") -> None:
    """Raise TargetError for a count or a side that the weights cannot have, however they are laid out;
    `config` is the raw mapping. Without weights: for more parts than this machine can describe."""
    fields = text_part(config)
    if held is None:
        parts = _largest(fields, LAYERS) * max(1, _largest(fields, EXPERTS))
        if parts * _DESCRIBED > memory_bytes():
            raise TargetError(f"{name}: {where} has {parts} layers and experts of layers; {_ADVICE}")
        return
    most_of = ((LAYERS, held.tensors), (EXPERTS, max(held.tensors, held.longest)), (SIDES, held.numbers))
    for names, most in most_of:
        for field in names:
            if (value := _number(fields.get(field))) > most:
                raise TargetError(
                    f"{name}: {where} has {field} {value:,}, and the {held.tensors} tensors of "
                    f"{held.numbers:,} numbers allow {most:,} at most; {_ADVICE}"
                )


def may_be_larger(config: Mapping[str, Any], held: Held) -> bool:
    """Whether the model of a configuration could have more numbers than its weights, by a rough count: then
    its skeleton is to be counted (`check_numbers`)."""
    fields = text_part(config)
    hidden, layers, inner = (_largest(fields, names) for names in (SIDES[:3], LAYERS, _INNER))
    widths = (fields.get("num_attention_heads"), fields.get("head_dim"))
    heads = prod(max(1, _number(width)) for width in widths)
    rough = hidden * (_number(fields.get("vocab_size")) + layers * (3 * inner + 2 * heads))
    return bool(_largest(fields, EXPERTS)) or rough > _most_numbers(config, held)


def check_numbers(name: str, config: Mapping[str, Any], numbers: int, held: Held) -> None:
    """Raise TargetError when a model of so many `numbers` cannot be in the weights: what is missing would be
    made before anybody says so."""
    if numbers > _most_numbers(config, held):
        raise TargetError(
            f"{name}: config.json describes a model of {numbers:,} numbers, and its weights hold "
            f"{held.numbers:,}; {_ADVICE}"
        )


def _most_numbers(config: Mapping[str, Any], held: Held) -> int:
    return held.numbers * (_PACKED if config.get("quantization_config") else _LACKING)


def _largest(fields: Mapping[str, Any], names: Iterable[str]) -> int:
    return max((_number(fields.get(name)) for name in names), default=0)


def _number(value: Any) -> int:
    """The largest of a field that is a number, or has one for each layer; 0 for anything else."""
    if isinstance(value, list):
        return max(map(_number, value), default=0)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return int(min(value, 2**62)) if is_number else 0

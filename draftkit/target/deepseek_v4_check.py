"""Whether the files of a DeepSeek-V4 checkpoint hold what its `config.json` asks for: everything that is
wrong, at once, from the headers of the shards. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from draftkit.target.deepseek_v4_tensors import TensorSpec

FLOATS = ("BF16", "F16", "F32", "F64")
_SHOWN = 8  # names of each kind in a message
_OTHER_NAMES = (
    (".attn.kv_norm.", ".attn.norm."),
    ("embed.", "embed_tokens."),
    ("head.", "lm_head."),
    ("hc_head_", "hc_head.hc_"),
)


@dataclass(frozen=True)
class Found:
    """A tensor in the files: the name it has there, its shape and safetensors' name of its type."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def by_known_name(wanted: Iterable[str], found: Mapping[str, Found]) -> dict[str, Found]:
    """Tensors by DeepSeek's names; in files that Transformers wrote some have others and a prefix."""
    known: dict[str, Found] = {}
    for name in wanted:
        for other in (name, *_other_names(name)):
            hit = found.get(other) or found.get(f"model.{other}")
            if hit is not None:
                known[name] = hit
                break
    return known


def mismatches(wanted: Mapping[str, TensorSpec], found: Mapping[str, Found]) -> list[str]:
    """What does not fit, each a phrase: missing tensors, unexpected ones, wrong shapes or types, missing
    scales.

    A weight may lie there quantised, as DeepSeek releases it, with its scale, or as floats without one.
    """
    known = by_known_name(wanted, found)
    plain = {
        name
        for name in wanted
        if name.endswith(".scale") and _is_float(known.get(name.removesuffix("scale") + "weight"))
    }
    missing = sorted(n for n in wanted.keys() - known.keys() if n not in plain and not n.endswith(".scale"))
    lost = sorted(n for n in wanted.keys() - known.keys() if n not in plain and n.endswith(".scale"))
    used = {hit.name for name, hit in known.items() if name not in plain}
    surplus = sorted(found.keys() - used)
    wrong = [w for n, hit in sorted(known.items()) if n not in plain and (w := _wrong(n, wanted[n], hit))]
    parts = [_listed("missing", missing), _listed("scales missing:", lost), _listed("unexpected", surplus)]
    return [part for part in (*parts, _listed("wrong:", wrong)) if part]


def _other_names(name: str) -> list[str]:
    found = []
    for theirs, transformers in _OTHER_NAMES:
        if theirs in name and (theirs.startswith(".") or name.startswith(theirs)):
            found.append(name.replace(theirs, transformers, 1))
    return found


def _is_float(found: Found | None) -> bool:
    return found is not None and found.dtype in FLOATS


def _wrong(name: str, spec: TensorSpec, found: Found) -> str | None:
    shape: tuple[int, ...] = spec.shape
    types: tuple[str, ...] = (spec.dtype,)
    if spec.dtype in ("BF16", "F32"):
        types = FLOATS
    elif spec.dtype == "I64":
        types = ("I64", "I32")
    elif spec.dtype == "F8_E8M0":
        types = ("F8_E8M0", *FLOATS)
        if spec.shape != found.shape and found.shape == _blocks_of_groups(spec.shape):
            shape = found.shape  # of experts in FP8, as base checkpoints have them
    elif spec.dtype == "F8_E4M3":
        types = ("F8_E4M3", *FLOATS)
    elif found.dtype != "I8":  # packed FP4, or not packed
        types, shape = ("I8", "F8_E4M3", *FLOATS), (spec.shape[0], 2 * spec.shape[1])
    if found.shape == shape and found.dtype in types:
        return None
    said = f"{found.name} is {found.dtype} {list(found.shape)}"
    return f"{said}, must be {' or '.join(types)} {list(shape)}"


def _blocks_of_groups(shape: tuple[int, ...]) -> tuple[int, int]:
    """Scales per 128 x 128 block of a weight that has `shape` scales per row and 32 columns."""
    return -(-shape[0] // 128), -(-shape[1] // 4)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(names[:_SHOWN])}{more}"

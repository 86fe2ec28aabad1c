"""DeepSeek-V4 as a target: its checkpoints as DeepSeek releases them, FP8 and packed FP4 included.

The model is Transformers' `DeepseekV4ForCausalLM`. Transformers alone dequantises such a checkpoint on a GPU
only, and skips what does not fit; here every tensor is checked by name, shape and type from the shards'
headers, and then read, dequantised and put in its place one after the other, so that no weight lies in memory
twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file

from draftkit.artefact import read_json
from draftkit.errors import TargetError
from draftkit.target.deepseek_v4_check import Found, by_known_name, mismatches
from draftkit.target.deepseek_v4_tensors import TensorSpec, checkpoint_tensors
from draftkit.target.fp8_fp4 import dequantise_fp4, dequantise_fp8
from draftkit.target.shards import tensor_places

DRAFT_PREFIX = "mtp."
# From DeepSeek's names within a block to those of Transformers' modules; all that fit are applied, in order.
_RENAMED = [
    (re.compile(pattern), put)
    for pattern, put in (
        (r"^attn\.indexer\.compressor\.", "attn.compressor.indexer."),
        (r"^attn\.indexer\.weights_proj", "attn.compressor.indexer.scorer.weights_proj"),
        (r"^attn\.indexer\.wq_b", "attn.compressor.indexer.q_b_proj"),
        (r"^attn\.", "self_attn."),
        (r"^ffn\.", "mlp."),
        (r"^attn_norm\.", "input_layernorm."),
        (r"^ffn_norm\.", "post_attention_layernorm."),
        (r"^hc_(attn|ffn)_", r"\1_hc."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.norm\.", ".kv_norm."),
        (r"\.ape$", ".position_bias"),
        (r"\.w(q_a|q_b|kv|o_a|o_b)\.", r".\1_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    )
]
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.w([123])\.weight$")
_WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
}


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor lies in Transformers' modules: a parameter or buffer, or the part of one
    that holds an expert's w1, w2 or w3."""

    name: str
    expert: int | None = None
    part: int = 0

    def part_of(self, tensor: Tensor) -> Tensor:
        """The view of the module's tensor that this one fills."""
        if self.expert is None:
            return tensor
        whole = tensor[self.expert]
        if self.part == 2:
            return whole
        half = len(whole) // 2
        return whole[:half] if self.part == 1 else whole[half:]


def place_in_block(name: str) -> Place:
    """The place of a block's tensor (`attn.wq_a.weight`) within a decoder layer."""
    if expert := _EXPERT.match(name):
        stacked = "down_proj" if expert[2] == "2" else "gate_up_proj"
        return Place(f"mlp.experts.{stacked}", int(expert[1]), int(expert[2]))
    for pattern, put in _RENAMED:
        name = pattern.sub(put, name)
    return Place(name)


def place_of(name: str) -> Place:
    """The place of a target's tensor in `DeepseekV4ForCausalLM`."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        place = place_in_block(rest)
        return Place(f"model.layers.{layer}.{place.name}", place.expert, place.part)
    return Place(_WHOLE.get(name) or f"model.{name.replace('hc_head_', 'hc_head.hc_')}")


class Shards:
    """The tensors of a checkpoint on disk by DeepSeek's names, dequantised as they are read.

    Raises TargetError when a file is missing or damaged.
    """

    def __init__(self, name: str, places: Mapping[str, str]) -> None:
        self._name = name
        self._files: dict[str, Any] = {}
        lost = sorted({Path(p).name for p in places.values() if not Path(p).exists()})
        if lost:
            raise TargetError(f"{name}: {', '.join(lost)} is missing, which the index names; copy it again")
        self.found: dict[str, Found] = {}
        for tensor, path in places.items():
            try:
                part = self._open(path).get_slice(tensor)
            except (SafetensorError, OSError) as error:
                raise TargetError(f"{path}: is damaged ({error}); copy it again") from error
            self.found[tensor] = Found(tensor, tuple(part.get_shape()), str(part.get_dtype()))
        self._places = dict(places)

    def known_as(self, wanted: Iterator[str] | list[str]) -> dict[str, Found]:
        """What is there of the wanted names."""
        return by_known_name(wanted, self.found)

    def read(self, weight: Found, scale: Found | None, dtype: torch.dtype) -> Tensor:
        """A tensor as floats, dequantised where it has a scale; integers as they are."""
        found = self._get(weight)
        if scale is not None and found.dtype == torch.int8:
            return dequantise_fp4(found, self._get(scale), dtype)
        if scale is not None:
            return dequantise_fp8(found, self._get(scale), dtype)
        return found.to(dtype) if found.is_floating_point() else found

    def _get(self, found: Found) -> Tensor:
        path = self._places[found.name]
        try:
            tensor: Tensor = self._open(path).get_tensor(found.name)
        except (SafetensorError, OSError) as error:
            raise TargetError(f"{path}: is damaged ({error}); copy it again") from error
        return tensor

    def _open(self, path: str) -> Any:
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]


def load_model(name: str, source: str, revision: str | None, config: Any, dtype: torch.dtype) -> Any:
    """`DeepseekV4ForCausalLM` with a checkpoint's weights in `dtype` (norms, hyper-connections and sinks in
    float32 where that is half precision). Raises TargetError that lists everything that is missing or does
    not fit."""
    tensors = wanted_tensors(name, raw_config(source, revision))
    wanted = {n: s for n, s in tensors.items() if not is_draft(n)}
    places = {n: p for n, p in tensor_places(source, revision).items() if not is_draft(n)}
    shards = Shards(name, places)
    if wrong := mismatches(wanted, shards.found):
        raise TargetError(f"{name}: its tensors do not fit its config.json: {'; '.join(wrong)}")
    config.quantization_config = None  # read as floats
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _widen(model, dtype)
    own = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        fill({place_of(n): n for n in wanted if not n.endswith(".scale")}, own, shards)
    return model


def over_devices(model: Any) -> Any:
    """The loaded model with its layers on all devices that there are, one after the other. Raises TargetError
    without accelerate."""
    try:
        accelerate = import_module("accelerate")
    except ImportError as error:
        raise TargetError("target.spread: layers needs accelerate: pip install accelerate") from error
    whole = model._no_split_modules
    memory = accelerate.utils.get_balanced_memory(model, no_split_module_classes=whole)
    places = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=whole)
    return accelerate.dispatch_model(model, places)


def fill(names: Mapping[Place, str], own: Mapping[str, Tensor], shards: Shards) -> None:
    """Copy tensors into the module's `own`, each read when its turn comes."""
    wanted = [*names.values(), *(n.removesuffix("weight") + "scale" for n in names.values())]
    known = shards.known_as(wanted)
    for place, name in names.items():
        scale = known.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
        target = own[place.name]
        place.part_of(target).copy_(shards.read(known[name], scale, target.dtype))


def wanted_tensors(name: str, raw: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """`checkpoint_tensors`, whose errors name the checkpoint, too."""
    try:
        return checkpoint_tensors(raw)
    except TargetError as error:
        raise TargetError(f"{name}: {error}") from error


def raw_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """`config.json` as it is written. Raises TargetError when it is no mapping."""
    path = Path(str(cached_file(source, "config.json", revision=revision)))
    found = read_json(path, TargetError)
    if not isinstance(found, dict):
        raise TargetError(f"{path}: is a {type(found).__name__}, must be a mapping; copy it again")
    return found


def is_draft(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to a draft module."""
    return name.removeprefix("model.").startswith(DRAFT_PREFIX)


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Keep in float32 what the family keeps so in half precision."""
    if dtype not in (torch.bfloat16, torch.float16):
        return
    kept = set(model._keep_in_fp32_modules_strict)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and kept & set(name.split(".")):
            tensor.data = tensor.data.float()

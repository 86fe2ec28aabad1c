"""Loading a target through Transformers: from a name to the model and what must be known of it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_accelerate_available
from transformers.utils.logging import disable_progress_bar

from draftkit.errors import TargetError, one_line
from draftkit.target import deepseek_v4
from draftkit.target.check import check_target
from draftkit.target.config_sizes import Held, check_counts, check_numbers, held_by, held_in, may_be_larger
from draftkit.target.deepseek_v4_tensors import FAMILY
from draftkit.target.fingerprint import fingerprint
from draftkit.target.gguf import unpacked
from draftkit.target.interface import TargetInfo
from draftkit.target.place import find_target
from draftkit.target.shards import tensor_places
from draftkit.target.transformers import (
    DTYPES,
    NOTHING_LEFT_OUT,
    TransformersTarget,
)

# what Transformers raises of files that it cannot read
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    AttributeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,  # a field of another type than the family's
)
_SCALE = re.compile(
    r"scale|qweight|qzeros|scales$|g_idx|absmax|weight_packed|_blocks$|zero_point|quant_state"
)


def best_device() -> str:
    """A GPU where there is one, under torchrun the process's own; else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def load_target(
    path: str,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    spread: str = "none",
) -> TransformersTarget:
    """Load a folder, a GGUF file, a hub id, or one of the names "tiny" and "smollm2" (see `resolve_target`)
    onto a device, or spread as `TargetSettings.spread` says.

    Safetensors or GGUF, no remote code. Quantised checkpoints load where Transformers and the package that it
    needs for them are there. Raises TargetError when it is not there, has no weights, lacks some of them,
    does not fit the interface (`check_target`), or when dtype or device are not available.
    """
    if dtype not in DTYPES:
        raise TargetError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TargetError(f"{path}: cannot use device {device!r}: {one_line(error)}") from error
    source = resolve_target(path, revision)
    raw, held = checked_config(path, source, revision), _held(source, revision)
    check_counts(path, raw, held)  # of a hub id, whose weights are fetched now
    if not sys.stderr.isatty():
        disable_progress_bar()  # Transformers draws its bar into log files too
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        _check_quantisation(config, path)
        if config.model_type != FAMILY:
            if held is not None and may_be_larger(raw, held):
                _check_skeleton(path, raw, config, held)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_placement(device, spread),
            )
        else:
            loaded = _deepseek_v4(path, source, revision, config, dtype, spread), NOTHING_LEFT_OUT
        folder = Path(str(cached_file(source, "config.json", revision=revision))).parent
    except UNREADABLE as error:
        raise TargetError(f"{path}: cannot load a target: {said(error)}") from error
    model, loading = loaded
    if loading["missing_keys"]:  # Transformers would go on with random numbers in their place
        missing = sorted(loading["missing_keys"])
        raise TargetError(
            f"{path}: {len(missing)} weights are missing, {missing[0]} first; give the complete checkpoint"
        )
    _check_scales(loading["unexpected_keys"], path)
    _check_generation_config(folder)
    text = config.get_text_config()
    info = TargetInfo(
        name=path,
        revision=folder.name if folder.parent.name == "snapshots" else revision,  # the hub's commit
        fingerprint=fingerprint(folder),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        hidden_size=int(text.hidden_size),
        num_layers=int(text.num_hidden_layers),
        stop_token_ids=stop_tokens(model, path),
        max_length=longest_context(text),
        family=str(text.model_type),
    )
    try:
        target = TransformersTarget(model.to(device) if spread == "none" else model, info)
    except (RuntimeError, AssertionError) as error:
        raise TargetError(f"{path}: cannot use device {device!r}: {one_line(error)}") from error
    target.pads_left = check_target(target)
    return target


def said(error: Exception) -> str:
    """What an error of Transformers says, in one line."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    if isinstance(error, KeyError):  # a name that it looked up
        return f"its configuration has {one_line(error)}, which Transformers does not know"
    return one_line(error)


def _deepseek_v4(path: str, source: str, revision: str | None, config: Any, dtype: str, spread: str) -> Any:
    if spread == "tensors":
        raise TargetError(f"{path}: DeepSeek-V4's tensors are not split; give target.spread: layers")
    model = deepseek_v4.load_model(path, source, revision, config, DTYPES[dtype])
    return deepseek_v4.over_devices(model) if spread == "layers" else model


# families that look like one that draftkit runs and are another
OTHER_FAMILIES = {"deepseek_v41": "DeepSeek-V4.1, another architecture than DeepSeek-V4"}


def written_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """`config.json` as it is written; empty where it cannot be read, which whoever reads it all will say."""
    try:
        return dict(PretrainedConfig.get_config_dict(source, revision=revision)[0])
    except (OSError, ValueError, TypeError):
        return {}


def model_type(source: str, revision: str | None = None) -> str | None:
    """The family that a `config.json` names; None where it cannot be read."""
    found = written_config(source, revision).get("model_type")
    return str(found) if found else None


def checked_config(path: str, source: str, revision: str | None = None) -> dict[str, Any]:
    """`written_config`. Raises TargetError for a family that would be taken for another one, for counts that
    the weights in a folder cannot have, and for a DeepSeek-V4 that lacks what its tensors follow from."""
    raw = written_config(source, revision)
    kind = str(raw.get("model_type"))
    check_counts(path, raw, held_in(Path(source)))
    if kind in OTHER_FAMILIES:
        raise TargetError(
            f"{path}: is {OTHER_FAMILIES[kind]}, which draftkit does not run; give another target"
        )
    if kind == FAMILY:
        deepseek_v4.wanted_tensors(path, deepseek_v4.raw_config(source, revision))
    return raw


LONGROPE_SPARE = 64  # positions that a proposal may reach beyond the last token of an answer


def longest_context(text: Any) -> int:
    """Tokens that prompt and answer may have together. Where rotary angles change with the length of what is
    read (Phi-3's "longrope"), keys that were read before are turned by other angles than those after them:
    right up to the length from which they change, and no further."""
    longest = int(getattr(text, "max_position_embeddings", 2048))
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return longest
    first = rope.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    return min(longest, int(first or longest) - LONGROPE_SPARE)


def resolve_target(path: str, revision: str | None = None) -> str:
    """The folder that a target's name stands for (see `find_target`), or the name itself where it is a hub
    id. A GGUF file, or a folder that holds one, is unpacked once (`target/gguf.py`). Raises TargetError."""
    place = find_target(path, revision)
    if place is None:
        return path
    return str(place if place.is_dir() else unpacked(place))


def _held(source: str, revision: str | None) -> Held | None:
    """What a target's weights hold; shards of a hub checkpoint are fetched where they are missing."""
    if Path(source).is_dir():
        return held_in(Path(source))
    return held_by(map(Path, sorted(set(tensor_places(source, revision).values()))))


def _check_skeleton(path: str, raw: dict[str, Any], config: Any, held: Held) -> None:
    """Raise TargetError for a model that is larger than its weights, by its skeleton, which takes no memory:
    Transformers makes what is missing, or has another shape, before it says so."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    check_numbers(path, raw, sum(parameter.numel() for parameter in model.parameters()), held)


def _check_quantisation(config: Any, path: str) -> None:
    """Raise TargetError when weights are quantised in a way that Transformers would ignore or cannot read
    here."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return
    fields = described if isinstance(described, dict) else described.to_dict()
    if not AutoHfQuantizer.supports_quant_method(fields):
        method = fields.get("quant_method")
        raise TargetError(
            f"{path}: is quantised by {method!r}, which Transformers does not read; give another checkpoint"
        )


def _check_scales(unexpected: Iterable[str], path: str) -> None:
    """Raise TargetError when numbers that dequantise weights were left out: the model would run on wrong
    weights."""
    left_out = sorted(name for name in unexpected if _SCALE.search(name))
    if left_out:
        what = f"{len(left_out)} quantisation scales would be left out, {left_out[0]} first"
        raise TargetError(
            f"{path}: {what}; its config.json lacks the quantization_config, or the package for it is missing"
        )


def _check_generation_config(folder: Path) -> None:
    """Raise TargetError when the file is there and no JSON: Transformers would go on without its stop
    tokens."""
    path = folder / "generation_config.json"
    try:
        if path.exists():
            json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise TargetError(f"{path}: is damaged ({one_line(error)}); copy it again or remove it") from error


def stop_tokens(model: Any, name: str) -> tuple[int, ...]:
    """The ids that end an answer. Raises TargetError when the configuration holds something else."""
    found = (
        getattr(model.generation_config, "eos_token_id", None) or model.config.get_text_config().eos_token_id
    )
    if found is None:
        return ()
    ids = tuple(found) if isinstance(found, list | tuple) else (found,)
    if any(type(i) is not int for i in ids):
        raise TargetError(
            f"{name}: eos_token_id is {found!r}, must be a token id or a list of them; correct the "
            f"configuration"
        )
    return ids


def _placement(device: str, spread: str) -> dict[str, Any]:
    """Where Transformers puts the weights while it reads them. Without accelerate they go through the
    processor's memory."""
    if spread == "tensors":
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    if spread == "layers":
        return {"device_map": "auto"}
    return {"device_map": device} if device.startswith("cuda") and is_accelerate_available() else {}

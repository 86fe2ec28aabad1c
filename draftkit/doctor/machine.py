"""What the machine has for this pair: compiler, GPU, memory."""

from __future__ import annotations

import torch

from draftkit.draft.drafter import Drafter
from draftkit.engine.memory import available_bytes, bytes_per_position
from draftkit.evaluate.run import device_name
from draftkit.ops.native_build import NoNative, load_library
from draftkit.target.transformers import TransformersTarget


def machine_facts(target: TransformersTarget, drafter: Drafter) -> list[str]:
    """One sentence each."""
    weights = sum(p.numel() * p.element_size() for p in target.model.parameters())
    seen = {p.data_ptr() for p in target.model.parameters()}
    weights += sum(p.numel() * p.element_size() for p in drafter.parameters() if p.data_ptr() not in seen)
    context = bytes_per_position(target, drafter) * target.info.max_length
    free = available_bytes(target.device)
    return [
        f"machine: {device_name(target.device)}, {torch.get_num_threads()} threads; "
        f"{_compiled(target.device)}",
        f"memory: the pair's weights are {weights / 2**30:.2f} GiB, keys and values of one request of "
        f"{target.info.max_length:,} tokens {context / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are there "
        "for them",
    ]


def _compiled(device: torch.device) -> str:
    if device.type != "cpu":
        return "passes are recorded on the GPU"
    try:
        load_library("step")
    except NoNative as error:
        return f"no compiled passes ({error})"
    return "passes are compiled"

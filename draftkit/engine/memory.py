"""How much memory keys and values get, and how many blocks and tokens that is."""

from __future__ import annotations

import ctypes
import logging
import math
import os
from dataclasses import dataclass

import torch

from draftkit.draft.drafter import Drafter
from draftkit.engine.paged_model import key_numbers
from draftkit.engine.settings import EngineSettings
from draftkit.errors import ServeError
from draftkit.target.transformers import TransformersTarget

log = logging.getLogger("draftkit.engine")

# of what a GPU has free; of what a machine has: weights, logits and others take the rest
_GPU_SHARE, _CPU_SHARE = 0.8, 0.5
_CPU_BYTES = 2**30  # unless one request alone needs more


@dataclass(frozen=True)
class Room:
    """Blocks of the memory, and the longest request in tokens (room for a proposal after it is not
    counted)."""

    blocks: int
    max_length: int


def room_for(target: TransformersTarget, drafter: Drafter | None, settings: EngineSettings) -> Room:
    """What `kv_bytes` hold, at most what all requests at their longest need.

    Without `kv_bytes` they are `available_bytes` of a GPU; on a CPU a gibibyte, or what one request needs.
    Where neither they nor `max_length` are given, requests are at most as long as the memory is. Raises
    ServeError when it does not hold one.
    """
    size, given = settings.block_size, settings.kv_bytes
    ahead = (drafter.gamma if drafter is not None else 0) + 1
    longest = min(settings.max_length or target.info.max_length, target.info.max_length)
    block_bytes = size * bytes_per_position(target, drafter)
    needed = -(-(longest + ahead) // size)
    room = _chosen_bytes(target.device, needed * block_bytes) if given is None else given
    held = room // block_bytes
    if held < needed and given is None and settings.max_length is None and held * size > ahead + 1:
        longest, needed = held * size - ahead, held
        log.warning(
            "requests of %d tokens at most fit the memory (the target allows %d)",
            longest,
            target.info.max_length,
        )
    if held < needed:
        enough = math.ceil(1000 * needed * block_bytes / 2**30) / 1000
        what, way_out = ("kv_bytes", f"{enough:g} GiB or ") if given is not None else ("the free memory", "")
        raise ServeError(
            f"{what} of {room / 2**30:.2g} GiB hold {held * size} tokens and one request may have {longest}; "
            f"give {way_out}a smaller max_length"
        )
    return Room(min(held, settings.max_running * needed), longest)


def bytes_per_position(target: TransformersTarget, drafter: Drafter | None) -> int:
    """Keys and values of one token in all layers of both models, and what else the drafter keeps."""
    numbers = 2 * key_numbers(target)
    if drafter is not None:
        numbers += drafter.config.numbers_per_token
    return numbers * target.head_weight().element_size()


def available_bytes(device: torch.device) -> int:
    """Bytes that keys and values may take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_SHARE)


def return_freed_memory() -> None:
    """Hand what was freed back to the system: glibc keeps it, some 400 MiB after a model of 135 M was loaded
    and laid out. Other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _chosen_bytes(device: torch.device, for_one_request: int) -> int:
    available = available_bytes(device)
    return available if device.type == "cuda" else min(available, max(_CPU_BYTES, for_one_request))

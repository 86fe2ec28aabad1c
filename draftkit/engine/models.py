"""From names to the two models in memory: the target after its pass, the drafter beside it, and the blocks they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import Drafter
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.engine.hf_model import HFModel
from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.memory import room_for
from draftkit.engine.paged_drafter import PagedDrafter
from draftkit.engine.paged_eagle import PagedEagle
from draftkit.engine.paged_model import PagedModel, unsupported
from draftkit.engine.settings import EngineInfo, EngineSettings
from draftkit.errors import ServeError
from draftkit.target.transformers import TransformersTarget, best_device, load_target


@dataclass(frozen=True)
class Models:
    """Both models over one pool of blocks. `feature_layers` is empty and `drafter` None without a drafter."""

    info: EngineInfo
    model: PagedModel | HFModel
    drafter: PagedDrafter | PagedEagle | None
    feature_layers: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    pool: BlockPool
    device: torch.device
    dtype: torch.dtype


def build_models(
    target: str | TransformersTarget, drafter: str | Path | Drafter | None, settings: EngineSettings
) -> Models:
    """Load what is given by name, and lay out the memory. Raises TargetError, CheckpointError or ServeError."""
    loaded = load_for_engine(target, settings) if isinstance(target, str) else target
    weight = loaded.head_weight()
    if isinstance(drafter, str | Path):
        drafter = open_drafter(Path(drafter), loaded)
    if drafter is not None:
        drafter = drafter.to(weight.device, weight.dtype).eval()
    gamma = drafter.gamma if drafter is not None else 0
    reason = unsupported(loaded)
    room = room_for(loaded, drafter, settings)
    max_length, slots = room.max_length, room.blocks * settings.block_size
    model = HFModel(loaded) if reason else PagedModel(loaded, slots, max_length + gamma + 1)
    fast: PagedDrafter | PagedEagle | None = None
    if drafter is not None:
        fast = _fast_drafter(drafter, slots, max_length)
    info = EngineInfo(
        name=loaded.info.name,
        max_length=max_length,
        vocab_size=loaded.info.vocab_size,
        gamma=gamma,
        kv_blocks_total=room.blocks,
        max_running=settings.max_running,
        algorithm=drafter.config.algorithm if drafter is not None else "none",
        forward=f"Transformers ({reason})" if reason else "PyTorch operations",
    )
    ahead = fast is not None and fast.looks_ahead  # its last row of a block holds a token of the next
    reuse = settings.prefix_reuse and not reason and not ahead
    pool = BlockPool(room.blocks, settings.block_size, reuse)
    layers = drafter.config.feature_layers if drafter is not None else ()
    return Models(info, model, fast, layers, loaded.info.stop_token_ids, pool, weight.device, weight.dtype)


def _fast_drafter(drafter: Drafter, slots: int, max_length: int) -> PagedDrafter | PagedEagle:
    """The paged form of a drafter. Raises ServeError for a kind that has none."""
    if isinstance(drafter, BlockDrafter):
        return PagedDrafter(drafter, slots, max_length)
    if isinstance(drafter, EagleDrafter):
        return PagedEagle(drafter, slots, max_length)
    raise ServeError(f"the engine runs block drafters and EAGLE-3, not {type(drafter).__name__}; use `draftkit.decode`")


def load_for_engine(target: str, settings: EngineSettings) -> TransformersTarget:
    """The target on the settings' device, in their dtype. Raises TargetError."""
    device = settings.device or best_device()
    dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
    return load_target(target, dtype=dtype, device=device)

"""From names to the two models in memory: the target after its pass, the drafter beside it, and the blocks
they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

import torch

from draftkit.draft.algorithms import algorithm_named
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import Drafter
from draftkit.engine.hf_model import HFModel
from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.memory import room_for
from draftkit.engine.paged_drafter import PagedBlockDrafter
from draftkit.engine.paged_eagle import PagedEagle
from draftkit.engine.paged_model import PagedModel, unsupported
from draftkit.engine.plain_drafter import PlainDrafter
from draftkit.engine.settings import EngineInfo, EngineSettings
from draftkit.target.loading import best_device, load_target
from draftkit.target.transformers import TransformersTarget

PagedDrafter = PagedBlockDrafter | PagedEagle | PlainDrafter


@dataclass(frozen=True)
class Models:
    """Both models over one pool of blocks. `feature_layers` is empty and `drafter` None without a drafter."""

    info: EngineInfo
    model: PagedModel | HFModel
    drafter: PagedDrafter | None
    feature_layers: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    pool: BlockPool
    device: torch.device
    dtype: torch.dtype

    def drop_copies(self) -> None:
        """Compiled passes are in use: no weight needs to lie here a second time."""
        for model in (self.model, self.drafter):
            if isinstance(model, PagedModel | PagedBlockDrafter):
                model.drop_copies()

    def forget(self, block: int) -> None:
        """Drop what is kept outside the blocks for the request that has this first block."""
        for model in (self.model, self.drafter):
            if isinstance(model, HFModel | PlainDrafter):
                model.forget(block)


def build_models(
    target: str | TransformersTarget, drafter: str | Path | Drafter | None, settings: EngineSettings
) -> Models:
    """Load what is given by name, and lay out the memory. Raises TargetError, CheckpointError or
    ServeError."""
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
    fast: PagedDrafter | None = None
    if drafter is not None:
        fast = paged_drafter(drafter, slots, max_length)
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


def paged_drafter(drafter: Drafter, slots: int, max_length: int) -> PagedDrafter:
    """A drafter's form over the engine's paged memory, or `propose` itself where its algorithm has
    none, or not for what this drafter has."""
    paged = algorithm_named(drafter.config.algorithm).paged
    if paged is None or drafter.config.only_run:
        return PlainDrafter(drafter)
    made: PagedDrafter = resolve_name(paged)(drafter, slots, max_length)
    return made


def load_for_engine(target: str, settings: EngineSettings) -> TransformersTarget:
    """The target on the settings' device, in their dtype. Raises TargetError."""
    device = settings.device or best_device()
    dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
    return load_target(target, dtype=dtype, device=device)

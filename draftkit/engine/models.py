"""From names to the two models in memory: the target behind its pass, the drafter beside it, and the blocks they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import open_drafter
from draftkit.draft.drafter import Drafter
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.engine.compiled import CompiledPasses
from draftkit.engine.fast_drafter import FastDrafter
from draftkit.engine.fast_eagle import FastEagle
from draftkit.engine.fast_model import FastModel, unsupported
from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.settings import EngineInfo, EngineSettings
from draftkit.engine.slow_model import SlowModel
from draftkit.errors import ServeError
from draftkit.target.transformers import TransformersTarget, best_device, load_target


@dataclass(frozen=True)
class Models:
    """Both models over one pool of blocks. `feature_layers` is empty and `drafter` None without a drafter."""

    info: EngineInfo
    model: FastModel | SlowModel
    drafter: FastDrafter | FastEagle | None
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
        drafter = open_drafter(Path(drafter), loaded, weight.dtype)
    if drafter is not None:
        drafter = drafter.to(weight.device, weight.dtype).eval()
    max_length = min(settings.max_length or loaded.info.max_length, loaded.info.max_length)
    gamma = drafter.gamma if drafter is not None else 0
    reason = unsupported(loaded)
    blocks = count_blocks(loaded, drafter, settings, max_length + gamma + 1)
    slots = blocks * settings.block_size
    model = SlowModel(loaded) if reason else FastModel(loaded, slots, max_length + gamma + 1)
    fast: FastDrafter | FastEagle | None = None
    if drafter is not None:
        fast = _fast_drafter(drafter, slots, max_length)
    info = EngineInfo(
        name=loaded.info.name,
        max_length=max_length,
        vocab_size=loaded.info.vocab_size,
        gamma=gamma,
        kv_blocks_total=blocks,
        max_running=settings.max_running,
        algorithm=drafter.config.algorithm if drafter is not None else "none",
        forward=f"Transformers ({reason})" if reason else "lean",
    )
    behind = fast is not None and fast.looks_ahead  # its last row of a block holds a token of the next
    reuse = settings.prefix_reuse and not reason and not behind
    pool = BlockPool(blocks, settings.block_size, reuse)
    layers = drafter.config.feature_layers if drafter is not None else ()
    return Models(info, model, fast, layers, loaded.info.stop_token_ids, pool, weight.device, weight.dtype)


def _fast_drafter(drafter: Drafter, slots: int, max_length: int) -> FastDrafter | FastEagle:
    """The paged form of a drafter. Raises ServeError for a kind that has none."""
    if isinstance(drafter, BlockDrafter):
        return FastDrafter(drafter, slots, max_length)
    if isinstance(drafter, EagleDrafter):
        return FastEagle(drafter, slots, max_length)
    raise ServeError(f"the engine runs block drafters and EAGLE-3, not {type(drafter).__name__}; use `draftkit.decode`")


def load_for_engine(target: str, settings: EngineSettings) -> TransformersTarget:
    """The target on the settings' device, in their dtype. Raises TargetError."""
    device = settings.device or best_device()
    dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
    return load_target(target, dtype=dtype, device=device)


def start_compiling(models: Models) -> CompiledPasses | None:
    """C++ passes, built in the background, or on a GPU recorded ones; None where neither can run."""
    fits = models.device.type == "cuda" or (models.device.type == "cpu" and models.dtype != torch.float64)
    if not fits or not isinstance(models.model, FastModel):
        return None
    drafter = models.drafter if isinstance(models.drafter, FastDrafter) else None
    widest = models.pool.blocks_for(models.info.max_length + models.info.gamma + 1)
    return CompiledPasses(models.model, drafter, models.feature_layers, widest)


def count_blocks(target: TransformersTarget, drafter: Drafter | None, settings: EngineSettings, longest: int) -> int:
    """Blocks that fit `kv_bytes`, at most what all requests at their longest need. Raises ServeError for less than one."""
    config = target.model.config.get_text_config()
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    numbers = int(config.num_hidden_layers) * heads * head_dim
    if drafter is not None:
        numbers += drafter.config.num_layers * drafter.config.num_kv_heads * drafter.config.head_dim
    block_bytes = 2 * numbers * target.head_weight().element_size() * settings.block_size
    per_request = -(-longest // settings.block_size)
    blocks = min(settings.kv_bytes // block_bytes, settings.max_running * per_request)
    if blocks < per_request:
        raise ServeError(
            f"kv_bytes of {settings.kv_bytes / 2**30:.2g} GiB hold {blocks * settings.block_size} tokens and one request may "
            f"have {longest}; give {math.ceil(1000 * per_request * block_bytes / 2**30) / 1000:g} GiB or a smaller max_length"
        )
    return blocks

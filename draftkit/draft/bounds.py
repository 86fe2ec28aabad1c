"""What a drafter's configuration may ask for, so that a file with a wrong number in it is an error before
memory is used."""

from __future__ import annotations

from dataclasses import fields

from draftkit.draft.drafter import DrafterShape
from draftkit.errors import ConfigError

# Least and most, wide enough for every model that there is. Fields that a shape lacks, or that are None, are
# passed over.
BOUNDS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_layers": (1, 1024),
    "num_heads": (1, 4096),
    "num_kv_heads": (1, 4096),
    "head_dim": (1, 4096),
    "vocab_size": (1, 2**24),
    "draft_vocab_size": (2, 2**24),
    "num_target_layers": (2, 4096),
    "block_size": (1, 1024),
    "markov_rank": (0, 2**16),
    "window": (1, 2**31),
    "conv_kernel_size": (1, 64),
    "conv_group_size": (1, 2**17),
    "selector_rank": (1, 2**16),
    "selector_top_k": (1, 1024),
    "refiner_rank": (1, 2**16),
    "refiner_mlp": (1, 2**20),
    "refiner_passes": (1, 1024),
    "input_embedding_scale": (1e-6, 1e6),
    "max_length": (1, 2**31),
    "rms_eps": (1e-12, 0.1),
    "rope_theta": (1, 1e12),
    "logit_scale": (1e-6, 1e6),
    "soft_cap": (1e-3, 1e6),
    "rotary_share": (1e-3, 1),
}


def check_bounds(config: DrafterShape) -> None:
    """Raise ConfigError that names the first field outside its bounds; NaN is outside."""
    for field in fields(config):
        value, (least, most) = getattr(config, field.name), BOUNDS.get(field.name, (0, 0))
        if field.name in BOUNDS and value is not None and not least <= value <= most:
            raise ConfigError(f"drafter.{field.name}: {value} must lie between {least:g} and {most:g}")
    if getattr(config, "head", "none") != "none" and not getattr(config, "markov_rank", 0):
        raise ConfigError("drafter.markov_rank: 0, but the sequential head needs 1 or more")

"""Rotary frequencies of drafters, plain and scaled for long contexts (llama3, yarn, linear).

How a kind scales is Transformers' own function. Kinds whose angles change with the length of what is read
("dynamic", "longrope") are refused: keys that were written before would be turned otherwise than those
after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draftkit.errors import ConfigError

if TYPE_CHECKING:
    from draftkit.draft.drafter import DrafterShape

SCALED = ("llama3", "yarn", "linear")
_NUMBERS = (
    "factor low_freq_factor high_freq_factor original_max_position_embeddings beta_fast beta_slow "
    "attention_factor "
    "mscale mscale_all_dim"
).split()


def scaling_of(parameters: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The scaling in `rope_parameters` or `rope_scaling` of a configuration, None for plain embeddings.
    Raises ConfigError for a kind that no drafter has, or a number that is none."""
    said = parameters or {}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind in ("default", "proportional", None):
        return None
    if kind not in SCALED:
        raise ConfigError(
            f"drafter.rope_scaling: rope_type {kind!r} is not known for drafters; known are default, "
            f"{', '.join(SCALED)}"
        )
    found = {"rope_type": kind} | {name: said[name] for name in _NUMBERS if said.get(name) is not None}
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    wrong = [
        n for n, v in found.items() if n != "rope_type" and (type(v) not in (int, float) or not 0 < v < 1e12)
    ]
    wrong += [n for n in needed if n not in found]
    if wrong:
        name = wrong[0]
        raise ConfigError(f"drafter.rope_scaling: {name} is {said.get(name)!r}; give a number above 0")
    return found


def rotary_frequencies(config: DrafterShape, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [D / 2], and the factor on cos and sin. With a `rotary_share` below 1
    only that part turns (Transformers calls this rope type "proportional")."""
    if config.rope_scaling is not None:
        return _scaled(config, device)
    powers = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-powers
    frequencies[int(config.rotary_share * config.head_dim // 2) :] = 0
    return frequencies, 1.0


def _scaled(config: DrafterShape, device: torch.device | None) -> tuple[Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = dict(config.rope_scaling or {})
    scaling.setdefault("original_max_position_embeddings", config.max_length)
    stand_in = LlamaConfig(
        hidden_size=config.num_heads * config.head_dim,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_length,
        rope_parameters={"rope_theta": config.rope_theta, **scaling},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](stand_in, device)
    return frequencies.float(), float(factor)

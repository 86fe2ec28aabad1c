"""A block drafter that begins as a piece of its target instead of at random.

Its layers start as copies of some of the target's, its final norm as the target's, and the projection of the features
passes the deepest one through, with a fifth of the usual random start on top. The drafter's frozen embedding and head are the
target's too, so a first layer that is copied knows what it reads, and a last one speaks the head's language: layers spread
over the target learn faster than its last ones (docs/training.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftkit.draft.block import BlockDrafter
from draftkit.errors import ConfigError
from draftkit.target.interface import HasWeights

RANDOM_SHARE = 0.2  # of the random start of `fc` that stays


def spread_start_layers(depth: int, num_layers: int) -> tuple[int, ...]:
    """`depth` layers from the target's first to its last, evenly spread; the last alone when it is one."""
    if depth == 1:
        return (num_layers - 1,)
    return tuple(round(i * (num_layers - 1) / (depth - 1)) for i in range(depth))


@torch.no_grad()
def start_from_target(
    drafter: BlockDrafter, layers: Sequence[HasWeights], norm: HasWeights, chosen: Sequence[int] | None = None
) -> None:
    """Overwrite the drafter's starting weights with those of the target's decoder `layers` (all, in order) and `norm`.

    `chosen` are the layers to copy, one for each of the drafter's; null: evenly spread ones. Raises ConfigError when there
    are too many or too few, or when a layer's shapes or parts are not the drafter's.
    """
    hidden, depth = drafter.config.hidden_size, drafter.config.num_layers
    if depth > len(layers):
        raise ConfigError(f"drafter.start: {depth} drafter layers cannot start from a target of {len(layers)}; use random")
    chosen = tuple(chosen or spread_start_layers(depth, len(layers)))
    if len(chosen) != depth or not all(0 <= i < len(layers) for i in chosen):
        allowed = f"give {depth}, one per drafter layer, from 0 to {len(layers) - 1}"
        raise ConfigError(f"drafter.start_layers: {list(chosen)} does not fit, {allowed}")
    try:
        for own, index in zip(drafter.layers, chosen, strict=True):
            own.load_state_dict(layers[index].state_dict())
        drafter.norm.load_state_dict(norm.state_dict())
    except RuntimeError as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"drafter.start: the target's layers do not fit the drafter's ({what}); use random") from error
    drafter.fc.weight.mul_(RANDOM_SHARE)
    drafter.fc.weight[:, -hidden:].add_(torch.eye(hidden, dtype=drafter.fc.weight.dtype))

"""A block drafter that begins as a piece of its target instead of at random.

Its layers start as copies of the target's last ones, its final norm as the target's, and the projection of the features
passes the deepest one through, with a fifth of the usual random start on top. The drafter's frozen head is the target's,
so its first guesses already speak the target's language; in a short training that is worth many steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from draftkit.draft.block import BlockDrafter
from draftkit.errors import ConfigError

RANDOM_SHARE = 0.2  # of the random start of `fc` that stays


@torch.no_grad()
def start_from_target(drafter: BlockDrafter, layers: Sequence[nn.Module], norm: nn.Module) -> None:
    """Overwrite the drafter's starting weights with those of the target's decoder `layers` (all, in order) and `norm`.

    Raises ConfigError when a layer's shapes or parts are not the drafter's.
    """
    hidden, depth = drafter.config.hidden_size, drafter.config.num_layers
    if depth > len(layers):
        raise ConfigError(f"drafter.start: {depth} drafter layers cannot start from a target of {len(layers)}; use random")
    try:
        for own, source in zip(drafter.layers, layers[len(layers) - depth :], strict=True):
            own.load_state_dict(source.state_dict())
        drafter.norm.load_state_dict(norm.state_dict())
    except RuntimeError as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"drafter.start: the target's layers do not fit the drafter's ({what}); use random") from error
    drafter.fc.weight.mul_(RANDOM_SHARE)
    drafter.fc.weight[:, -hidden:].add_(torch.eye(hidden, dtype=drafter.fc.weight.dtype))

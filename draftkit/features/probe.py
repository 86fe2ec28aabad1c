"""Are these the target's own hidden states, of these layers? The target reads the same tokens, and they are
compared: ids of layers count from two beginnings, and nothing fails where they are mixed up.

Shapes: E tokens, F = K * H features of K layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftkit.errors import DraftkitError
from draftkit.target.interface import Target
from draftkit.target.transformers import last_tap

SAME = 0.05  # relative distance of the same layer read twice, in half precision


@torch.inference_mode()
def compare_states(
    name: str,
    error: type[DraftkitError],
    target: Target,
    layers: Sequence[int],
    tokens_E: Tensor,
    states: tuple[Tensor, Tensor],
    last_hidden: bool,
    advice: str,
) -> None:
    """Compare `states`, features [E, F] and last hidden states after the norm [E, H] of these tokens, with
    what the target gives. Raises `error`, in which `name` speaks, that says which layer was given instead, or
    that the model is another one, and `advice`."""
    every = tuple(range(last_tap(target.info) + 1))
    output = target.forward(tokens_E[None].to(target.device), None, every)
    if output.features_BTF is None:
        raise error("the target returned no features")
    features_EF, last_EH = states
    own = output.features_BTF[0].float().cpu().unflatten(-1, (-1, target.info.hidden_size)).unbind(1)
    found = features_EF.float().unflatten(-1, (-1, target.info.hidden_size)).unbind(1)
    for layer, given in zip(layers, found, strict=True):
        if not _distance(given, own[layer]) <= SAME:
            like = min(every, key=lambda i: _distance(given, own[i]))
            known = _distance(given, own[like]) <= SAME
            what = f"the output of layer {like}" if known else "another model's"
            raise error(f"{name}: gives {what} where the output of layer {layer} is wanted; {advice}")
    if last_hidden and not _distance(last_EH, output.last_hidden_BTH[0].float().cpu()) <= SAME:
        raise error(f"{name}: its last hidden state is not the target's; {advice}")


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative, without the first token: its stream is far larger than all others in many models."""
    a, b = a[1:].float(), b[1:].float()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))

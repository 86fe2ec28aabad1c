"""A block drafter that begins as a piece of its target instead of at random.

Its layers start as copies of some of the target's, its final norm as the target's, and the projection of the
features passes the deepest one through, with a fifth of the usual random start on top. The drafter's frozen
embedding and head are the target's too, so a first layer that is copied knows what it reads, and a last one
speaks the head's language: layers spread over the target learn faster than its last ones
(docs/results/recipes.md).

A target without norms on queries and keys (Llama) lends nothing to a drafter with them (the Qwen3 block,
which engines load for every target). Such a norm divides by the vector's own size; the weights that undo this
best are fitted to captured features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftkit.draft.backbone import Attention, DraftLayer, RMSNorm
from draftkit.draft.block import BlockDrafter
from draftkit.errors import ConfigError
from draftkit.target.interface import HasWeights

RANDOM_SHARE = 0.2  # of the random start of `fc` that stays


@dataclass(frozen=True)
class CapturedText:
    """Some of the target's tokens, int64 [T], and their features [T, F], as a feature store holds them."""

    tokens_T: Tensor
    features_TF: Tensor


def spread_start_layers(depth: int, num_layers: int) -> tuple[int, ...]:
    """`depth` layers from the target's first to its last, evenly spread; the last alone when it is one."""
    if depth == 1:
        return (num_layers - 1,)
    return tuple(round(i * (num_layers - 1) / (depth - 1)) for i in range(depth))


@torch.no_grad()
def start_from_target(
    drafter: BlockDrafter,
    layers: Sequence[HasWeights],
    norm: HasWeights,
    chosen: Sequence[int] | None = None,
    text: CapturedText | None = None,
) -> None:
    """Overwrite the drafter's starting weights with those of the target's decoder `layers` (all, in order)
    and `norm`.

    `chosen` are the layers to copy, one for each of the drafter's; null: evenly spread ones. `text` is needed
    where the target has no query and key norms and the drafter has. Raises ConfigError when there are too
    many or too few layers, or when a layer's shapes or parts are not the drafter's.
    """
    hidden, depth = drafter.config.hidden_size, drafter.config.num_layers
    if depth > len(layers):
        raise ConfigError(
            f"drafter.start: {depth} drafter layers cannot start from a target of {len(layers)}; use random"
        )
    chosen = tuple(chosen or spread_start_layers(depth, len(layers)))
    if len(chosen) != depth or not all(0 <= i < len(layers) for i in chosen):
        allowed = f"give {depth}, one per drafter layer, from 0 to {len(layers) - 1}"
        raise ConfigError(f"drafter.start_layers: {list(chosen)} does not fit, {allowed}")
    try:
        for own, index in zip(drafter.draft_layers(), chosen, strict=True):
            if _copy_layer(own, layers[index]):
                _fit_norms(own, _layer_input(drafter, index, text))
        drafter.norm.load_state_dict(norm.state_dict())
    except RuntimeError as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"drafter.start: the target's layers do not fit the drafter's ({what}); use random"
        ) from error
    drafter.fc.weight.mul_(RANDOM_SHARE)
    drafter.fc.weight[:, -hidden:].add_(torch.eye(hidden, dtype=drafter.fc.weight.dtype))


def _copy_layer(own: DraftLayer, source: HasWeights) -> bool:
    """Copy a layer's weights; True when the drafter's query and key norms found nothing to copy."""
    weights, norms = source.state_dict(), {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    lacking = norms <= set(own.state_dict()) and not norms & set(weights)
    own.load_state_dict(weights | {name: own.state_dict()[name] for name in norms} if lacking else weights)
    return lacking


def _layer_input(drafter: BlockDrafter, index: int, text: CapturedText | None) -> Tensor:
    """The residual stream nearest to the one that the target's layer `index` reads: the embedding or a
    captured one, [T, H]."""
    if text is None:
        raise ConfigError(
            "drafter.start: this target has no query and key norms; they are fitted to a feature store, "
            "give one"
        )
    layers = drafter.config.feature_layers
    nearest = min((-1, *layers), key=lambda layer: abs(layer - (index - 1)))
    if nearest < 0:
        return drafter.embed(text.tokens_T)
    hidden = drafter.config.hidden_size
    return text.features_TF.unflatten(-1, (-1, hidden))[:, layers.index(nearest)].to(drafter.fc.weight.dtype)


def _fit_norms(layer: DraftLayer, stream_TH: Tensor) -> None:
    """Set the weights of both norms so that normed queries and keys are nearest to those without a norm
    (least squares)."""
    attention: Attention = layer.self_attn
    normed_TH = layer.input_layernorm(stream_TH)
    for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
        if isinstance(norm, RMSNorm):
            wanted_XD = projection(normed_TH).unflatten(-1, (-1, attention.head_dim)).flatten(0, 1)
            unit_XD = norm(wanted_XD) / norm.weight
            norm.weight.copy_((wanted_XD * unit_XD).sum(0) / unit_XD.square().sum(0).clamp_min(1e-6))

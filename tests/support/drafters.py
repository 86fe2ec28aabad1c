"""Small random drafters: on their own (40 tokens), and for a target of the tests."""

from __future__ import annotations

from dataclasses import replace

import torch

from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.drafter import Drafter, DrafterConfig, DrafterShape
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.draft.eagle3_shape import EagleConfig
from draftkit.target.transformers import TransformersTarget

BLOCK_CONFIG = DrafterConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=40,
    feature_layers=(0, 2),
    num_target_layers=4,
    mask_token_id=3,
    block_size=4,
    markov_rank=6,
    max_length=64,
)
EAGLE_CONFIG = EagleConfig(
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=40,
    feature_layers=(0, 2),
    num_target_layers=4,
    block_size=4,
    style="llama",
    max_length=64,
)
GEMMA = {"style": "gemma4", "shared_key_value": True, "rotary_share": 0.5, "soft_cap": 5.0}


def block_drafter(**changes: object) -> BlockDrafter:
    """On its own, all weights random."""
    torch.manual_seed(0)
    drafter = BlockDrafter(replace(BLOCK_CONFIG, **changes))  # type: ignore[arg-type]
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter


def make_drafter(
    target: TransformersTarget, head: str = "markov", layout: str = "anchor", block: int = 4
) -> BlockDrafter:
    """For a target; its proposals are not all wrong: its Markov head is random, its base is the target's
    head."""
    config = replace(BLOCK_CONFIG, block_size=block, layout=layout, head=head, confidence=head != "none")
    drafter = _made(target, replace(config, markov_rank=6 if head != "none" else 0))
    assert isinstance(drafter, BlockDrafter)
    if drafter.markov_head is not None:
        torch.nn.init.normal_(drafter.markov_head.markov_w2.weight)
    return drafter


def make_eagle(target: TransformersTarget, ids: tuple[int, ...]) -> Drafter:
    """An EAGLE-3 drafter for a target, with a draft vocabulary of `ids`."""
    sizes = {"vocab_size": target.info.vocab_size, "draft_vocab_size": len(ids)}
    return _made(target, replace(EAGLE_CONFIG, block_size=3, **sizes), torch.tensor(ids))


def eagle_for(target: TransformersTarget, **changes: object) -> EagleDrafter:
    """An EAGLE-3 drafter for a target that says again what this just said: right where it repeats itself."""
    config = replace(EAGLE_CONFIG, vocab_size=target.info.vocab_size, **changes)  # type: ignore[arg-type]
    size = config.draft_vocab_size
    drafter = _made(target, config, torch.arange(0, target.info.vocab_size, 2)[:size] if size else None)
    assert isinstance(drafter, EagleDrafter)
    torch.nn.init.eye_(drafter.fc.weight[:, -32:])
    return drafter


def _made(target: TransformersTarget, config: DrafterShape, ids: torch.Tensor | None = None) -> Drafter:
    """Of the target's width and vocabulary, in float64."""
    torch.manual_seed(1)
    vocab = target.info.vocab_size
    shape = replace(config, hidden_size=32, intermediate_size=48, vocab_size=vocab, max_length=256)
    return new_drafter(shape, target.embedding_weight(), target.head_weight(), ids).double().eval()

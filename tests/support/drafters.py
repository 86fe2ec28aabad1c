"""Small random drafters."""

from __future__ import annotations

from dataclasses import replace

import torch

from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.drafter import Drafter, DrafterConfig
from draftkit.draft.eagle3 import EagleConfig, EagleDrafter
from draftkit.target.transformers import TransformersTarget


def make_drafter(
    target: TransformersTarget, head: str = "markov", layout: str = "anchor", block: int = 4
) -> BlockDrafter:
    """A random drafter whose proposals are not all wrong: its Markov head is random, its base is the target's
    head."""
    torch.manual_seed(1)
    config = DrafterConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=target.info.vocab_size,
        feature_layers=(0, 2),
        num_target_layers=4,
        mask_token_id=3,
        block_size=block,
        layout=layout,
        head=head,
        markov_rank=6 if head != "none" else 0,
        confidence=head != "none",
        max_length=256,
    )
    drafter = new_drafter(config, target.embedding_weight(), target.head_weight())
    if drafter.markov_head is not None:
        torch.nn.init.normal_(drafter.markov_head.markov_w2.weight)
    return drafter.double().eval()


def make_eagle(target: TransformersTarget, ids: tuple[int, ...]) -> Drafter:
    """A random EAGLE-3 drafter with a draft vocabulary of `ids`."""
    torch.manual_seed(1)
    config = EagleConfig(
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=target.info.vocab_size,
        feature_layers=(0, 2),
        num_target_layers=4,
        block_size=3,
        style="llama",
        max_length=256,
        draft_vocab_size=len(ids),
    )
    drafter = new_drafter(config, target.embedding_weight(), target.head_weight(), torch.tensor(ids))
    return drafter.double().eval()


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


def eagle_for(target: TransformersTarget, **changes: object) -> EagleDrafter:
    torch.manual_seed(1)
    vocab = target.info.vocab_size
    config = replace(EAGLE_CONFIG, hidden_size=32, vocab_size=vocab, max_length=256, **changes)  # type: ignore[arg-type]
    ids = torch.arange(0, vocab, 2)[: config.draft_vocab_size] if config.draft_vocab_size else None
    drafter = new_drafter(config, target.embedding_weight(), target.head_weight(), ids)
    assert isinstance(drafter, EagleDrafter)
    # says again what the target just said: right where it repeats itself
    torch.nn.init.eye_(drafter.fc.weight[:, -32:])
    return drafter.double().eval()

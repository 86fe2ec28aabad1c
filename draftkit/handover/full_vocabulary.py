"""A block drafter with a reduced draft vocabulary, made one that drafts from the whole: for engines that
take the target's head."""

from __future__ import annotations

from dataclasses import replace

import torch

from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.drafter import Drafter
from draftkit.errors import CheckpointError
from draftkit.target.interface import TargetWeights


def with_full_vocabulary(drafter: Drafter, target: TargetWeights) -> Drafter:
    """The same backbone over the target's whole head. Logits of the tokens that it could draft before are the
    same; the others come in with the target's row alone, without a Markov bias. Raises CheckpointError for
    another kind of drafter."""
    ids_W = drafter.draft_ids_W
    if not isinstance(drafter, BlockDrafter) or ids_W is None:
        raise CheckpointError("only a block drafter of a reduced vocabulary can be given the whole one")
    whole = new_drafter(
        replace(drafter.config, draft_vocab_size=None), target.embedding_weight(), target.head_weight()
    )
    weights = {
        n: t for n, t in drafter.state_dict().items() if n not in ("embed_tokens.weight", "lm_head.weight")
    }
    if drafter.markov_head is not None:
        rows = drafter.markov_head.markov_w2.weight
        spread = rows.new_zeros(drafter.config.vocab_size, rows.shape[1])
        weights["markov_head.markov_w2.weight"] = spread.index_copy(0, ids_W, rows.detach())
    with torch.no_grad():
        whole.load_state_dict(weights, strict=False)
    return whole.to(drafter.norm.weight.dtype).eval()

"""Drafters whose head may have fewer rows than the target's: only the chosen tokens can be drafted.

The head is most of what a draft costs at a large vocabulary. What is drafted stays exact: the drafter's
distribution is 0 outside its vocabulary, and verification takes that into account.

Shapes: V vocabulary, W draft vocabulary, N rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftkit.draft.drafter import Drafter
from draftkit.errors import ConfigError


class ReducedHead(Drafter):
    """`draft_ids_W` are the target ids of the draft vocabulary, None for the whole. `target_head_VH`, the
    target's head, is needed for training when it is not `lm_head`, and is no part of a checkpoint."""

    target_head_VH: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("target_head_VH", None, persistent=False)

    def choose_vocabulary(self, draft_ids_W: Tensor | None, target_head_VH: Tensor | None) -> None:
        """Set the draft vocabulary and the target's head to train with. Raises ConfigError when the
        vocabulary has not the configured size, names a token twice, or one that the target does not have."""
        found = None if draft_ids_W is None else len(draft_ids_W)
        if found != self.config.draft_vocab_size:
            raise ConfigError(
                f"drafter.draft_vocab_size: {self.config.draft_vocab_size}, but {found} tokens were chosen"
            )
        if draft_ids_W is not None:
            lowest, highest = int(draft_ids_W.min()), int(draft_ids_W.max())
            if (
                lowest < 0
                or highest >= self.config.vocab_size
                or len(draft_ids_W.unique()) < len(draft_ids_W)
            ):
                raise ConfigError(
                    f"draft vocabulary: its ids must be distinct and within 0..{self.config.vocab_size - 1}"
                )
        self.draft_ids_W = draft_ids_W
        self.target_head_VH = target_head_VH.detach() if target_head_VH is not None else None

    def over_target(self, logits_NW: Tensor) -> Tensor:
        """Draft logits over the target's vocabulary, -inf outside the draft vocabulary: [N, V]."""
        if self.draft_ids_W is None:
            return logits_NW
        outside = logits_NW.new_full((len(logits_NW), self.config.vocab_size), float("-inf"))
        return outside.index_copy_(-1, self.draft_ids_W, logits_NW)

    def draft_tokens(self, tokens_N: Tensor) -> Tensor:
        """Target ids as the head counts them, -1 outside the draft vocabulary."""
        if self.draft_ids_W is None:
            return tokens_N
        places_V = tokens_N.new_full((self.config.vocab_size,), -1)
        places_V[self.draft_ids_W] = torch.arange(len(self.draft_ids_W), device=tokens_N.device)
        return places_V[tokens_N]

    def whole_head(self) -> Tensor:
        """The target's head [V, H]. Raises ConfigError for a reduced vocabulary without it."""
        if self.target_head_VH is not None:
            return self.target_head_VH
        if self.draft_ids_W is not None:
            raise ConfigError(
                "a drafter of a reduced vocabulary is trained together with its target: load it so"
            )
        return self.lm_head.weight

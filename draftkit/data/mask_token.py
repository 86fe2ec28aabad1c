"""Which token stands for the positions that a block drafter drafts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from draftkit.errors import ConfigError

# names of tokens kept for later uses
_SPARE = re.compile(r"reserved|unused|extra|pad|fim|filler|placeholder", re.IGNORECASE)


def choose_mask_token(tokenizer: Any, vocab_size: int, asked: int | None, count: Callable[[], Tensor]) -> int:
    """The id of the mask token: `asked`, else the tokenizer's own, else an unused row of the embedding (as
    DeepSpec does for Qwen3), else a special token that neither the chat template nor the data uses, reserved
    ones first.

    `count` gives how often each token stands in the training data, int64 [V]; it is called only where the
    data matters. Raises ConfigError when `asked` is outside the vocabulary or stands in the data, and when no
    token is free.
    """
    if asked is not None:
        if asked >= vocab_size:
            raise ConfigError(
                f"drafter.mask_token_id: {asked} must lie between 0 and the target's {vocab_size - 1}"
            )
        if times := int(count()[asked]):
            used = f"{asked} stands {times} times in the training data"
            raise ConfigError(f"drafter.mask_token_id: {used}; give a token that no text holds, or null")
        return asked
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    counts_V = count()
    free = [i for i in _spare_tokens(tokenizer, vocab_size) if not counts_V[i]]
    if free:
        return free[0]
    raise ConfigError(
        "drafter.mask_token_id: the tokenizer has no mask token, the embedding no unused row, and the "
        "data or the template use "
        f"every special token; give a token that no text holds, from 0 to {vocab_size - 1}, or take the "
        f"algorithm eagle3"
    )


def _spare_tokens(tokenizer: Any, vocab_size: int) -> list[int]:
    """Special tokens without a role in the tokenizer or the template: reserved ones first, then from the
    highest id down."""
    template, named = str(tokenizer.chat_template), set(tokenizer.all_special_ids)
    special = {
        i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special and str(t) not in template
    }
    spare = [i for i in sorted(special, reverse=True) if i not in named and i < vocab_size]
    return sorted(spare, key=lambda i: not _SPARE.search(special[i]))

"""One request inside the engine: its tokens, how far they were read, its random numbers and its counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from draftkit.engine.kv_cache import BlockTable
from draftkit.engine.outputs import PromptToken, RequestStats
from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import DataError
from draftkit.ops.sampling import request_generator

_ROUNDS_AHEAD = 32


class Uniforms:
    """The random numbers of one request, in the order in which `draftkit.decode` draws them.

    One for the first token, then `gamma` + 2 per round: drafts, length, next token. They are drawn for many
    rounds at once (a generator gives the same numbers however they are cut) and belong to the request, not to
    the batch.
    """

    def __init__(self, seed: int, gamma: int) -> None:
        self._generator = request_generator(seed)
        self._width = gamma + 2
        self._ahead = np.empty((0, self._width))
        self._next = 0

    def first(self) -> float:
        """In [0, 1), for the first token."""
        return float(torch.rand(1, generator=self._generator, dtype=torch.float64))

    def round(self) -> np.ndarray:
        """[gamma + 2] in [0, 1), for the next round."""
        if self._next == len(self._ahead):
            drawn = torch.rand(_ROUNDS_AHEAD * self._width, generator=self._generator, dtype=torch.float64)
            self._ahead, self._next = drawn.numpy().reshape(-1, self._width), 0
        self._next += 1
        return self._ahead[self._next - 1]


@dataclass(eq=False)
class Request:
    """`tokens` are prompt and answer; the first `computed` of them are in the memory of both models.

    `row` is the request's place in the arrays of the scheduler, -1 while it waits. `stop_ids` maps each token
    that ends the answer to what the reason says about it (None for the target's own stop tokens).
    """

    id: str
    params: SamplingParams
    tokens: list[int]
    prompt_length: int
    limit: int  # tokens of the answer at most
    stop_ids: dict[int, int | None]
    uniforms: Uniforms
    gamma: int  # drafted tokens per round; 0 = no speculation
    row: int = -1
    computed: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    answered: float | None = None  # when the first token came
    cached_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    per_position: list[int] = field(default_factory=list)
    # of the prompt's tokens from the second on, where asked for
    scores: list[PromptToken] = field(default_factory=list)

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def decoding(self) -> bool:
        """All but the last token is in memory, and that one is the answer's."""
        return self.computed == len(self.tokens) - 1 and self.made > 0

    @property
    def to_read(self) -> int:
        """Tokens that must be read before a round can begin; the last token of an answer belongs to the
        round."""
        return len(self.tokens) - self.computed - (self.made > 0)

    @property
    def unscored(self) -> int:
        """Tokens of the prompt whose log probabilities are asked for and not there yet."""
        return 0 if self.params.prompt_logprobs is None else self.prompt_length - 1 - len(self.scores)

    @cached_property
    def keeps_proposal(self) -> bool:
        """A seeded sample must not depend on the load, so its proposals are verified whole."""
        return self.params.seed is not None and self.params.temperature > 0

    def stats(self) -> RequestStats:
        """A snapshot."""
        now = time.perf_counter()
        started, answered = self.started or now, self.answered or now
        return RequestStats(
            self.prompt_length,
            self.cached_tokens,
            self.made,
            self.rounds,
            self.drafted,
            self.verified,
            self.accepted,
            tuple(self.per_position),
            started - self.arrived,
            answered - started,
            now - answered,
        )


def check_request(tokens: Sequence[int], params: SamplingParams, vocab: int, longest: int) -> None:
    """Raise DataError where a prompt and what is asked for do not go into a context of `longest` tokens, or
    name tokens that a vocabulary of `vocab` does not have."""
    if not 1 <= len(tokens) < longest:
        raise DataError(
            f"a prompt of {len(tokens)} tokens: give 1 to {longest - 1} (the context is {longest})"
        )
    if params.max_tokens is not None and len(tokens) + params.max_tokens > longest:
        raise DataError(
            f"{len(tokens)} prompt + {params.max_tokens} new tokens: the context is {longest}; ask for less"
        )
    allowed = params.allowed_token_ids
    for name, ids in (
        ("prompt", tokens),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", allowed or ()),
        ("bad_token_ids", [token for word in params.bad_token_ids for token in word]),
    ):
        wrong = next((t for t in ids if not 0 <= t < vocab), None)
        if wrong is not None:
            raise DataError(f"{name}: token id {wrong} is out of vocabulary; allowed are 0 to {vocab - 1}")
    if allowed is not None and not allowed:
        raise DataError(
            "allowed_token_ids is empty: no token could follow; leave it out or give at least one id"
        )

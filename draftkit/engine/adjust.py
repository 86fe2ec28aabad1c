"""Changes to a request's logits before sampling: allowed tokens, bias, bad words, minimal length, penalties,
grammar.

They depend on the tokens before each position, drafted ones included, so that sampling with speculation has
the distribution of sampling without it. Order and meaning are vLLM's: masks and bias first, then the
penalties. A mask takes one pass over a row; all else touches the tokens that it is about.

Shapes: P positions in a row of one request, V vocabulary, K tokens that penalties are about.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftkit.engine.sampling_params import Constraint, SamplingParams

_NEVER = float("-inf")


class Adjustment:
    """The state of one request; `drafts` are the tokens after the answer that a proposal adds."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        vocab_size: int,
        like: Tensor,
    ) -> None:
        self._params, self._constraint, self._device = params, params.constraint, like.device
        self._made = 0
        self._tail: list[int] = []  # the end of the answer, as long as a bad word may reach back
        self._reach = max(map(len, params.bad_token_ids), default=1) - 1
        self._stop_ids = self._ids(list(stop_ids))
        bias = params.logit_bias or {}
        self._biased, self._bias_K = (
            self._ids(list(bias)),
            like.new_tensor(list(bias.values()), dtype=torch.float32),
        )
        self._forbidden_V = None
        if params.allowed_token_ids is not None:
            self._forbidden_V = torch.ones(vocab_size, dtype=torch.bool, device=like.device)
            self._forbidden_V[list(params.allowed_token_ids)] = False
        self._penalties = _Penalties(params, prompt) if params.penalises else None

    def apply(self, logits_PV: Tensor, drafts: Sequence[int], first: int = 0) -> None:
        """Change logits [P, V], float32 or wider, in place; row i follows the answer and the first `first` +
        i of the drafts."""
        if self._forbidden_V is not None:
            logits_PV.masked_fill_(self._forbidden_V, _NEVER)
        if len(self._biased):
            logits_PV.index_add_(1, self._biased, self._bias_K.to(logits_PV.dtype).expand(len(logits_PV), -1))
        if self._constraint is not None:
            self._follow(self._constraint, logits_PV, drafts, first)
        for row, logits_V in enumerate(logits_PV):
            if self._params.bad_token_ids:
                _forbid(logits_V, self._ids(self._bad_ends([*self._tail, *drafts[: first + row]])))
            if self._made + first + row < self._params.min_tokens:
                _forbid(logits_V, self._stop_ids)
        if self._penalties is not None:
            self._penalties.apply(logits_PV, drafts, first)

    def accept(self, tokens: Sequence[int]) -> int:
        """The answer goes on by these tokens, up to the one that completes the grammar: how many that is."""
        if self._constraint is not None:
            for taken, token in enumerate(tokens):
                self._constraint.accept(token)
                if self._constraint.finished:
                    tokens = tokens[: taken + 1]
                    break
        self._made += len(tokens)
        if self._reach:
            self._tail = [*self._tail, *tokens][-self._reach :]
        if self._penalties is not None:
            self._penalties.accept(tokens)
        return len(tokens)

    @property
    def finished(self) -> bool:
        """The grammar is complete."""
        return self._constraint is not None and self._constraint.finished

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self._device)

    def _bad_ends(self, before: list[int]) -> list[int]:
        """The tokens that would complete a bad word."""
        words = self._params.bad_token_ids
        return [last for *start, last in words if before[len(before) - len(start) :] == start]

    def _follow(self, constraint: Constraint, logits_PV: Tensor, drafts: Sequence[int], first: int) -> None:
        """The grammar's mask. After a token that it does not allow, or after its end, everything is: nobody
        gets there."""
        taken = 0
        for place in range(first + len(logits_PV)):
            if place >= first and taken == place and not constraint.finished:
                logits_PV[place - first].masked_fill_(~constraint.allowed().to(self._device), _NEVER)
            if place < len(drafts) and taken == place and constraint.accept(drafts[place]):
                taken += 1
        constraint.rollback(taken)


def _forbid(logits_V: Tensor, ids: Tensor) -> None:
    """Rule tokens out, except where nothing else is allowed."""
    if len(ids):
        before = logits_V[ids]
        logits_V[ids] = _NEVER
        if bool(logits_V.amax() == _NEVER):
            logits_V[ids] = before


class _Penalties:
    """Penalties on the tokens of a request's prompt and answer."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._params = params
        # in the answer, by token
        self._counts = dict.fromkeys(prompt if params.repetition_penalty != 1 else (), 0)

    def accept(self, tokens: Sequence[int]) -> None:
        """The answer goes on."""
        for token in tokens:
            self._counts[token] = self._counts.get(token, 0) + 1

    def apply(self, logits_PV: Tensor, drafts: Sequence[int], first: int) -> None:
        """See `Adjustment.apply`."""
        before = drafts[: first + len(logits_PV) - 1]
        places = {token: place for place, token in enumerate(dict.fromkeys([*self._counts, *before]))}
        if not places:
            return
        known = len(self._counts)
        drafted_PK = torch.zeros(len(before) + 1, len(places))
        drafted_PK[range(1, len(before) + 1), [places[token] for token in before]] = 1
        counts_PK = drafted_PK.cumsum(0)[first:][: len(logits_PV)]
        counts_PK[:, :known] += torch.tensor(list(self._counts.values()), dtype=torch.float32)
        counts_PK = counts_PK.to(logits_PV)
        ids_K = torch.tensor(list(places), device=logits_PV.device)
        logits_PK, params, seen_PK = logits_PV[:, ids_K], self._params, counts_PK > 0
        if params.repetition_penalty != 1:
            scaled = torch.where(
                logits_PK > 0, logits_PK / params.repetition_penalty, logits_PK * params.repetition_penalty
            )
            there = torch.arange(len(places), device=ids_K.device) < known  # in prompt or answer
            logits_PK = torch.where(seen_PK | there, scaled, logits_PK)
        logits_PV[:, ids_K] = (
            logits_PK - params.frequency_penalty * counts_PK - params.presence_penalty * seen_PK
        )


def wide(logits: Tensor) -> Tensor:
    """A copy in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)

"""Changes to a request's logits before sampling: allowed tokens, bias, bad words, minimal length, penalties, grammar.

They depend on the tokens before each position, drafted ones included, so that sampling with speculation has the law of
sampling without it. Order and meaning are vLLM's: masks and bias first, then the penalties.

Shapes: P positions in a row of one request, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftkit.engine.request import Constraint, SamplingParams

_NEVER = float("-inf")


def needs_adjustment(params: SamplingParams) -> bool:
    """Whether anything but temperature, top-k, top-p and min-p shapes the law."""
    return bool(
        params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_token_ids
        or params.min_tokens
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.constraint is not None
    )


class Adjustment:
    """The state of one request; `drafts` are the tokens behind the answer that a proposal adds."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], stop_ids: Sequence[int], vocab_size: int, like: Tensor
    ) -> None:
        self._params, self._constraint = params, params.constraint
        self._made = 0
        self._tail: list[int] = []  # the end of the answer, as long as a bad word may reach back
        self._reach = max(map(len, params.bad_token_ids), default=1) - 1
        self._stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=like.device)
        self._bias_V = _bias(params, vocab_size, like)
        self._penalised = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        )
        self._counts_V = like.new_zeros(vocab_size)  # of the answer
        self._prompt_V = torch.zeros(vocab_size, dtype=torch.bool, device=like.device)
        self._prompt_V[torch.tensor(list(prompt), dtype=torch.int64, device=like.device)] = True

    def apply(self, logits_PV: Tensor, drafts: Sequence[int], first: int = 0) -> Tensor:
        """New logits [P, V]; row i follows the answer and the first `first` + i of the drafts."""
        positions = len(logits_PV)
        adjusted = wide(logits_PV) if self._bias_V is None else logits_PV + self._bias_V
        if self._constraint is not None:
            adjusted.masked_fill_(~self._allowed(self._constraint, drafts, first, positions).to(adjusted.device), _NEVER)
        if self._params.bad_token_ids:
            adjusted = self._without_bad_words(adjusted, drafts, first)
        short = min(max(self._params.min_tokens - self._made - first, 0), positions)
        if short:
            adjusted[:short] = self._unending(adjusted[:short])
        return self._penalise(adjusted, drafts, first) if self._penalised else adjusted

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
        if self._penalised:
            index = torch.tensor(list(tokens), dtype=torch.int64, device=self._counts_V.device)
            self._counts_V.index_add_(0, index, torch.ones_like(index, dtype=self._counts_V.dtype))
        return len(tokens)

    @property
    def finished(self) -> bool:
        """The grammar is complete."""
        return self._constraint is not None and self._constraint.finished

    def _unending(self, logits_PV: Tensor) -> Tensor:
        """Without the tokens that end the answer, except where nothing else is allowed."""
        return _unless_nothing_is_left(logits_PV.index_fill(-1, self._stop_ids, _NEVER), logits_PV)

    def _without_bad_words(self, logits_PV: Tensor, drafts: Sequence[int], first: int) -> Tensor:
        """Without the tokens that would complete a bad word, except where nothing else is allowed."""
        masked_PV = logits_PV.clone()
        for row in range(len(masked_PV)):
            before = [*self._tail, *drafts[: first + row]]
            for *start, last in self._params.bad_token_ids:
                if before[len(before) - len(start) :] == start:
                    masked_PV[row, last] = _NEVER
        return _unless_nothing_is_left(masked_PV, logits_PV)

    def _allowed(self, constraint: Constraint, drafts: Sequence[int], first: int, positions: int) -> Tensor:
        """Bool [P, V]. Behind a token that the grammar does not allow, or behind its end, everything is: nobody gets there."""
        rows, taken = [], 0
        everything = torch.ones_like(self._prompt_V, device="cpu")
        for place in range(first + positions):
            if place >= first:
                reached = taken == place and not constraint.finished
                rows.append(constraint.allowed() if reached else everything)
            if place < len(drafts) and taken == place and constraint.accept(drafts[place]):
                taken += 1
        constraint.rollback(taken)
        return torch.stack(rows)

    def _penalise(self, logits_PV: Tensor, drafts: Sequence[int], first: int) -> Tensor:
        positions = len(logits_PV)
        counts_PV = self._counts_V.expand(positions, -1)
        before = drafts[: first + positions - 1]
        if before:
            index = torch.tensor(list(before), dtype=torch.int64, device=logits_PV.device)
            added = logits_PV.new_zeros(len(before) + 1, logits_PV.shape[1])
            added[torch.arange(1, len(before) + 1), index] = 1
            counts_PV = counts_PV + added.cumsum(0)[first : first + positions]
        params, seen_PV = self._params, counts_PV > 0
        if params.repetition_penalty != 1:
            scaled = torch.where(logits_PV > 0, logits_PV / params.repetition_penalty, logits_PV * params.repetition_penalty)
            logits_PV = torch.where(seen_PV | self._prompt_V, scaled, logits_PV)
        return logits_PV - params.frequency_penalty * counts_PV - params.presence_penalty * seen_PV


def _unless_nothing_is_left(masked_PV: Tensor, logits_PV: Tensor) -> Tensor:
    """The masked logits; where all are masked, those from before."""
    return torch.where((masked_PV == _NEVER).all(-1, keepdim=True), logits_PV, masked_PV)


def wide(logits: Tensor) -> Tensor:
    """A copy in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)


def _bias(params: SamplingParams, vocab_size: int, like: Tensor) -> Tensor | None:
    if not params.logit_bias and params.allowed_token_ids is None:
        return None
    bias_V = like.new_zeros(vocab_size)
    if params.allowed_token_ids is not None:
        bias_V.fill_(_NEVER)
        bias_V[list(params.allowed_token_ids)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias_V[token] += value
    return bias_V

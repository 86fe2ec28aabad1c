"""The end of a step: what verification kept becomes part of the answers.

Shapes: A requests that get a token, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from draftkit.engine.adjust import Adjustment
from draftkit.engine.kv_cache import BlockPool
from draftkit.engine.outputs import StepOutput, TokenEvent
from draftkit.engine.request import Request
from draftkit.engine.round import ProposalBatch, log_probs
from draftkit.engine.scheduler import ScheduledBatch


@dataclass(frozen=True)
class Outcome:
    """The verdict on the host: drafted tokens kept and next token, int64 [A] each, and the logits before
    adjustments, lengths + 1 rows per request."""

    proposals: ProposalBatch
    accepted_A: np.ndarray
    next_A: np.ndarray
    logits_NV: Tensor | None

    @staticmethod
    def nothing(proposals: ProposalBatch) -> Outcome:
        """Of a step in which nobody gets a token."""
        none = np.empty(0, np.int64)
        return Outcome(proposals, none, none, None)


def commit(
    batch: ScheduledBatch, outcome: Outcome, adjustments: dict[str, Adjustment], pool: BlockPool
) -> list[StepOutput]:
    """Add the tokens to the answers, publish full blocks, and say what is new. Finished requests are not yet
    removed."""
    proposals = outcome.proposals
    accepted, following = outcome.accepted_A.tolist(), outcome.next_A.tolist()
    lengths, counts = proposals.lengths_A.tolist(), batch.counts_R.tolist()
    drafts = proposals.host_tokens_AG.tolist() if proposals.drafting else [[]] * batch.answering
    outputs: list[StepOutput] = []
    first = 0  # row of logits of the request's first token
    drafted = set(proposals.drafting)
    for index, request in enumerate(batch.requests):
        if index >= batch.answering:
            request.computed += counts[index]
            pool.register(request.table, request.tokens, request.computed)
            continue
        kept = accepted[index]
        if index in drafted:
            _count(request, lengths[index], kept, proposals.tokens_AG.shape[1])
        elif index < batch.decoding:
            request.rounds += bool(request.gamma)
        tokens, reason, why = _cut(
            request, [*drafts[index][:kept], following[index]], adjustments.get(request.id)
        )
        first_output = not request.made
        request.tokens += tokens
        request.computed += counts[index] + min(kept, len(tokens))
        request.answered = request.answered or time.perf_counter()
        pool.register(request.table, request.tokens, request.computed)
        events = _events(request, tokens, kept, outcome.logits_NV, first)
        first += lengths[index] + 1
        rejected = tuple(drafts[index][kept : lengths[index]])
        prompt = (
            tuple(request.scores) if first_output and request.params.prompt_logprobs is not None else None
        )
        stop_token = reason == "stop" and tokens[-1] in request.stop_ids  # a grammar may end with any
        outputs.append(
            StepOutput(request.id, events, rejected, reason, why, request.stats(), prompt, stop_token)
        )
    return outputs


def _count(request: Request, length: int, kept: int, gamma: int) -> None:
    request.rounds += 1
    request.drafted += gamma
    request.verified += length
    request.accepted += kept
    for place in range(kept):
        request.per_position[place] += 1


def _cut(
    request: Request, tokens: list[int], adjustment: Adjustment | None
) -> tuple[list[int], str | None, int | None]:
    """The tokens up to the end of the answer, why it ended (None: it goes on), and which stop token ended
    it."""
    tokens = tokens[: request.limit - request.made]
    end = next((i for i, token in enumerate(tokens) if token in request.stop_ids), None)
    if end is not None:
        tokens = tokens[: end + 1]
    if adjustment is not None:
        taken = adjustment.accept(tokens)
        if taken < len(tokens) or adjustment.finished:
            return tokens[:taken], "stop", request.stop_ids.get(tokens[taken - 1])
    if end is not None:
        return tokens, "stop", request.stop_ids[tokens[-1]]
    return tokens, "length" if request.made + len(tokens) >= request.limit else None, None


def _events(
    request: Request, tokens: list[int], kept: int, logits_NV: Tensor | None, first: int
) -> tuple[TokenEvent, ...]:
    top = request.params.logprobs
    if top is None or logits_NV is None:
        return tuple([TokenEvent(t, "accepted" if i < kept else "target") for i, t in enumerate(tokens)])
    own, best = log_probs(logits_NV, range(first, first + len(tokens)), tokens, top)
    return tuple(
        TokenEvent(t, "accepted" if i < kept else "target", own[i], tuple(best[i]))
        for i, t in enumerate(tokens)
    )

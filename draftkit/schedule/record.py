"""Recording traces of answers: every token but the last is an anchor, and every proposal after it is verified
in full.

Many answers are read at once, padded on the right. The anchors are then visited from the front: all answers
draft and verify at one absolute position in one pass, of which cache and context keep the anchor.

Shapes: B answers, T tokens, S longest answer with its prompt, G = gamma drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from draftkit.draft.drafter import Drafter
from draftkit.ops.sampling import Sampling, processed_probs, request_generator
from draftkit.ops.verify import BLOCK_RULE, TOKEN_RULE, DenseProposals, verify
from draftkit.schedule.traces import Origin, TracedPrompt, Traces
from draftkit.target.interface import Target

BATCH, BATCH_TOKENS = 16, 4096  # answers read at once; their tokens, filled up to the longest


@dataclass(frozen=True)
class TraceItem:
    """A prompt and the target's own answer to it, as token ids."""

    prompt_id: str
    domain: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class TraceSettings:
    """How proposals are drawn and verified: the sampling that the answers were made with, and the
    randomness."""

    sampling: Sampling
    seed: int = 0


@torch.inference_mode()
def record_traces(
    target: Target,
    drafter: Drafter,
    items: Sequence[TraceItem],
    settings: TraceSettings,
    drafter_fingerprint: str,
    tick: Callable[[int], None] = lambda answers: None,
) -> Traces:
    """Traces of all answers of two tokens or more, in the order of `items`; `tick` is called as batches
    finish.

    Answers are cut where a proposal after them would no longer fit the target's context. There may be none to
    trace.
    """
    room = target.info.max_length - drafter.gamma
    cut = [replace(item, answer=item.answer[: max(0, room - len(item.prompt))]) for item in items]
    chosen = [(i, item) for i, item in enumerate(cut) if len(item.answer) > 1]
    found: dict[int, _Rows] = {}
    by_start = sorted(chosen, key=lambda pair: (len(pair[1].prompt), pair[0]))
    for batch in _batches(by_start):
        found.update(zip((i for i, _ in batch), _record_batch(target, drafter, batch, settings), strict=True))
        tick(len(batch))
    origin = Origin(
        target.info.name, target.info.fingerprint, drafter_fingerprint, settings.sampling.temperature
    )
    prompts, offset = [], 0
    for index, item in chosen:
        rows = len(found[index].accepted)
        prompts.append(TracedPrompt(item.prompt_id, item.domain, len(item.prompt), offset, rows))
        offset += rows
    ordered = [found[i] for i, _ in chosen]
    return Traces(
        origin,
        tuple(prompts),
        np.array([c for r in ordered for c in r.confidence], np.float32).reshape(-1, drafter.gamma),
        np.array([m for r in ordered for m in r.draft_max], np.float32).reshape(-1, drafter.gamma),
        np.array([a for r in ordered for a in r.accepted], np.int64),
        np.array([a for r in ordered for a in r.block_accepted], np.int64),
        np.array([u for r in ordered for u in r.usable], np.int64),
    )


def _batches(items: Sequence[tuple[int, TraceItem]]) -> Iterator[list[tuple[int, TraceItem]]]:
    """In their order; one that is longer than BATCH_TOKENS alone."""
    batch: list[tuple[int, TraceItem]] = []
    longest = 0
    for index, item in items:
        longest = max(longest, len(item.prompt) + len(item.answer))
        if batch and (len(batch) == BATCH or (len(batch) + 1) * longest > BATCH_TOKENS):
            yield batch
            batch, longest = [], len(item.prompt) + len(item.answer)
        batch.append((index, item))
    if batch:
        yield batch


@dataclass(frozen=True)
class _Rows:
    """The rows of one answer, in the order of its anchors."""

    confidence: list[np.ndarray]
    draft_max: list[np.ndarray]
    accepted: list[int]
    block_accepted: list[int]
    usable: list[int]


def _record_batch(
    target: Target, drafter: Drafter, batch: Sequence[tuple[int, TraceItem]], settings: TraceSettings
) -> list[_Rows]:
    gamma, layers, stops = drafter.gamma, drafter.config.feature_layers, target.info.stop_token_ids
    texts = [item.prompt + item.answer for _, item in batch]
    longest = max(map(len, texts))
    tokens_BS = torch.tensor([[*t, *[0] * (longest - len(t))] for t in texts], device=target.device)
    anchors = [range(len(item.prompt), len(item.prompt) + len(item.answer) - 1) for _, item in batch]
    uniforms_BSG = torch.stack(
        [
            torch.rand(longest, gamma + 2, generator=request_generator(settings.seed, i), dtype=torch.float64)
            for i, _ in batch
        ]
    )
    cache, context = target.new_cache(), drafter.new_context(len(batch))
    whole = target.forward(tokens_BS[:, :-1], cache, layers)

    def extend(begin: int, end: int) -> None:
        if whole.features_BTF is not None:
            drafter.extend(context, whole.features_BTF[:, begin:end], tokens_BS[:, begin + 1 : end + 1])

    start, stop = min(a.start for a in anchors), max(a.stop for a in anchors)
    cache.crop(start)
    extend(0, start)
    rows = [_Rows([], [], [], [], []) for _ in batch]
    for position in range(start, stop):
        anchor_B, uniforms_BG = tokens_BS[:, position], uniforms_BSG[:, position]
        proposal = drafter.propose(context, anchor_B, settings.sampling, uniforms_BG[:, :gamma])
        read = target.forward(torch.cat([anchor_B[:, None], proposal.tokens_BG], 1), cache)
        cache.crop(position + 1)
        extend(position, position + 1)
        probs_BTV = processed_probs(target.logits(read.last_hidden_BTH), settings.sampling)
        lengths_B = torch.full((len(batch),), gamma, device=target.device)
        proposals = DenseProposals(proposal.tokens_BG, probs_BTV, proposal.probs_BGV, lengths_B)
        token_B, block_B = (
            verify(rule, proposals, uniforms_BG[:, gamma:]).accepted_R.cpu()
            for rule in (TOKEN_RULE, BLOCK_RULE)
        )
        tokens_BG = proposal.tokens_BG.cpu()
        confidence_BG, draft_max_BG = (
            _said(proposal.confidence_BG, tokens_BG),
            _said(proposal.largest_BG, tokens_BG),
        )
        for b, own in enumerate(anchors):
            if position in own:
                usable = _until_stop(tokens_BG[b].tolist(), stops)
                rows[b].usable.append(usable)
                rows[b].accepted.append(min(int(token_B[b]), usable))
                rows[b].block_accepted.append(min(int(block_B[b]), usable))
                rows[b].confidence.append(confidence_BG[b])
                rows[b].draft_max.append(draft_max_BG[b])
    return rows


def _said(values_BG: Tensor | None, tokens_BG: Tensor) -> np.ndarray:
    """What a drafter said of its tokens, float32; NaN where it said nothing."""
    return (
        torch.full(tokens_BG.shape, float("nan")).numpy()
        if values_BG is None
        else values_BG.float().cpu().numpy()
    )


def _until_stop(tokens: Sequence[int], stop_token_ids: Sequence[int]) -> int:
    """Positions up to and including the first stop token."""
    return next((i + 1 for i, token in enumerate(tokens) if token in stop_token_ids), len(tokens))

"""The readable reference loop for one request: draft, plan, verify, commit, crop.

Plain decoding is the same loop without a drafter: a proposal of length zero, of which the verification rule
keeps nothing and adds the target's own token. Nothing here is clever; the engine must agree with it.

Shapes: B = 1 request, T tokens, G = gamma drafted tokens, V vocabulary, F = features of all chosen layers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draftkit.draft.drafter import Drafter, Proposal
from draftkit.errors import DataError
from draftkit.ops.sampling import Sampling, processed_probs, request_generator, sample
from draftkit.ops.verify import TOKEN_RULE, DenseProposals, Rule, verify
from draftkit.target.interface import Target

# from a proposal's confidences (none without a head) to tokens to verify
Plan = Callable[[Sequence[float]], int]


@dataclass(frozen=True)
class Round:
    """One draft-verify-commit round.

    `drafted` tokens were proposed, the first `verified` of them read by the target, and `accepted` of these
    kept by the verification rule; `emitted` tokens were added to the answer, the bonus token included (fewer
    than accepted + 1 only when a stop token or the limit cut the round).
    """

    drafted: int
    verified: int
    accepted: int
    emitted: int
    confidence: tuple[float, ...] = ()


@dataclass(frozen=True)
class Decoded:
    """An answer: its tokens (a stop token included), why it ended, its rounds, and the seconds it took."""

    tokens: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    rounds: tuple[Round, ...]
    prefill_seconds: float
    decode_seconds: float


def verify_all(confidence_G: Sequence[float]) -> int:
    """The plan that verifies every drafted token."""
    return sys.maxsize


@torch.inference_mode()
def decode(
    target: Target,
    drafter: Drafter | None,
    prompt: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
    rule: Rule = TOKEN_RULE,
    plan: Plan = verify_all,
) -> Decoded:
    """Answer one prompt (token ids) with at most `max_new_tokens` tokens.

    At temperature 0 the answer equals the target's own greedy decoding; above it, it has exactly the target's
    distribution. All randomness comes from `seed`. `plan` says how many drafted tokens to verify; it must be
    one of those that keep it (see `schedule.planner`). Raises DataError for an empty prompt or one that
    leaves no room.
    """
    if not prompt or max_new_tokens < 1:
        raise DataError(
            f"prompt of {len(prompt)} tokens, {max_new_tokens} new tokens: both must be at least 1"
        )
    gamma = drafter.gamma if drafter else 0
    if len(prompt) + max_new_tokens + gamma > target.info.max_length:
        raise DataError(
            f"prompt of {len(prompt)} + {max_new_tokens} new + {gamma} drafted tokens: "
            f"the target's maximum is {target.info.max_length}; shorten the prompt or lower the limit"
        )
    layers = drafter.config.feature_layers if drafter else ()
    random = request_generator(seed)
    started = time.perf_counter()

    # Prefill: the target reads the prompt and makes the first anchor; the drafter listens.
    cache = target.new_cache()
    prompt_BT = torch.tensor([list(prompt)], device=target.device)
    read = target.forward(prompt_BT, cache, layers)
    first_probs_BV = processed_probs(target.logits(read.last_hidden_BTH[:, -1]), sampling)
    anchor_B = sample(first_probs_BV, torch.rand(1, generator=random, dtype=torch.float64))
    context = drafter.new_context() if drafter else None
    if drafter and context is not None and read.features_BTF is not None:
        drafter.extend(context, read.features_BTF, torch.cat([prompt_BT[:, 1:], anchor_B[:, None]], dim=1))
    answer = [int(anchor_B)]
    rounds: list[Round] = []
    prefilled = time.perf_counter()

    while len(answer) < max_new_tokens and answer[-1] not in target.info.stop_token_ids:
        # Draft: gamma tokens after the anchor, with the very probabilities they were drawn from.
        uniforms = torch.rand(gamma + 2, generator=random, dtype=torch.float64)
        if drafter and context is not None:
            proposal = drafter.propose(context, anchor_B, sampling, uniforms[None, :gamma])
        else:
            proposal = _empty_proposal(target)

        # Plan: how much of the proposal is worth verifying, by its confidences alone.
        confidence = tuple(proposal.confidence_BG[0].tolist()) if proposal.confidence_BG is not None else ()
        verified = min(plan(confidence), gamma)
        tokens_BL, draft_probs_BLV = proposal.tokens_BG[:, :verified], proposal.probs_BGV[:, :verified]

        # Verify: one target pass over the anchor and that part of the proposal.
        read = target.forward(torch.cat([anchor_B[:, None], tokens_BL], dim=1), cache, layers)
        probs_BTV = processed_probs(target.logits(read.last_hidden_BTH), sampling)
        lengths_B = torch.tensor([verified], device=target.device)
        proposals = DenseProposals(tokens_BL, probs_BTV, draft_probs_BLV, lengths_B)
        verdict = verify(rule, proposals, uniforms[None, gamma:])
        accepted = int(verdict.accepted_R)
        new_tokens = [*tokens_BL[0, :accepted].tolist(), int(verdict.next_token_R)]

        # Commit what was kept, and crop what was read in vain: cache and context hold all but the new anchor.
        anchor_B = verdict.next_token_R
        cache.crop(len(prompt) + len(answer) + accepted)
        if drafter and context is not None and read.features_BTF is not None:
            drafter.extend(
                context,
                read.features_BTF[:, : accepted + 1],
                torch.tensor([new_tokens], device=target.device),
            )
        kept = _until_stop(new_tokens, target.info.stop_token_ids)[: max_new_tokens - len(answer)]
        answer += kept
        rounds.append(Round(gamma, verified, accepted, len(kept), confidence))

    finished = time.perf_counter()
    reason = "stop" if answer[-1] in target.info.stop_token_ids else "length"
    return Decoded(tuple(answer), reason, tuple(rounds), prefilled - started, finished - prefilled)


def _empty_proposal(target: Target) -> Proposal:
    tokens_BG = torch.empty(1, 0, dtype=torch.int64, device=target.device)
    return Proposal(tokens_BG, torch.empty(1, 0, target.info.vocab_size, device=target.device), None)


def _until_stop(tokens: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop_token_ids:
            return tokens[: index + 1]
    return tokens

"""The reference loop: greedy answers are the target's own, sampled ones have its distribution, for any
drafter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from draftkit.decode import Plan, Round, decode, verify_all
from draftkit.draft.drafter import HEADS, Drafter
from draftkit.errors import DataError
from draftkit.ops.sampling import Sampling, processed_probs
from draftkit.ops.verify import RULES, TOKEN_RULE, Rule
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter, make_eagle

PROMPTS = [[4, 20, 31, 7], [9, 9, 9], [40, 41, 42, 43, 44, 45, 46], [300]]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_greedy_equals_the_targets_own_generate(target: TransformersTarget, head: str, rule: object) -> None:
    drafter = make_drafter(target, head)
    for prompt in PROMPTS:
        own = target.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        for with_drafter in (None, drafter):
            answer = decode(target, with_drafter, prompt, Sampling(0.0), 24, rule=rule)  # type: ignore[arg-type]
            assert list(answer.tokens) == own
            assert answer.finish_reason == ("stop" if own[-1] in target.info.stop_token_ids else "length")
            assert sum(r.emitted for r in answer.rounds) + 1 == len(answer.tokens)


def test_the_other_layout_drafts_one_token_less(target: TransformersTarget) -> None:
    drafter = make_drafter(target, "none", "one_plus_n", block=5)
    answer = decode(target, drafter, PROMPTS[0], Sampling(0.0), 16)
    assert answer.rounds[0].drafted == 4
    assert answer.tokens == decode(target, None, PROMPTS[0], Sampling(0.0), 16).tokens


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_greedy_answers_do_not_depend_on_the_plan(target: TransformersTarget, rule: Rule) -> None:
    drafter = make_drafter(target)
    lengths = iter([0, 1, 4, 2, 3, 0, 9] * 9)
    plain = decode(target, None, PROMPTS[0], Sampling(0.0), 24)
    planned = decode(
        target, drafter, PROMPTS[0], Sampling(0.0), 24, rule=rule, plan=lambda confidence: next(lengths)
    )
    assert planned.tokens == plain.tokens
    assert [r.verified for r in planned.rounds[:5]] == [0, 1, 4, 2, 3]
    assert all(r.accepted <= r.verified <= r.drafted == len(r.confidence) == 4 for r in planned.rounds)


class Shrunk(TransformersTarget):
    """The target with all but three tokens forbidden, so that its distribution can be enumerated."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        return logits.masked_fill(torch.arange(logits.shape[-1]) >= 8, float("-inf")).masked_fill(
            torch.arange(logits.shape[-1]) < 5, float("-inf")
        )


def cut_by_confidence(confidence: Sequence[float]) -> int:
    """Any length, decided by the first confidence, which was there before the first drafted token."""
    return int(confidence[0] * 1e4) % 4


@pytest.mark.slow
@pytest.mark.parametrize("plan", [verify_all, cut_by_confidence])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_sampled_answers_follow_the_targets_distribution(
    target: TransformersTarget, rule: Rule, plan: Plan
) -> None:
    """500 answers of three tokens from three: every count within five standard deviations of the target's
    distribution. (The proof is the enumeration in test_exactness; this is the real loop.)"""
    drafter = make_drafter(target, block=3)
    assert drafter.confidence_head is not None
    torch.nn.init.normal_(drafter.confidence_head.proj.weight, std=0.5)
    rounds = check_distribution(target, drafter, rule, plan)
    assert len({r.verified for r in rounds}) >= (1 if plan is verify_all else 3)


@pytest.mark.slow
def test_sampled_answers_of_eagle3_follow_the_targets_distribution(target: TransformersTarget) -> None:
    """Its draft vocabulary knows two of the three tokens, and one that the target never says."""
    rounds = check_distribution(target, make_eagle(target, (5, 7, 9)), TOKEN_RULE, verify_all)
    assert {r.accepted for r in rounds} >= {0, 1, 2}


def check_distribution(
    target: TransformersTarget, drafter: Drafter, rule: Rule, plan: Plan, count: int = 500
) -> list[Round]:
    small = Shrunk(target.model, target.info)
    prompt, sampling = PROMPTS[0], Sampling(0.8)
    found: dict[tuple[int, ...], int] = {}
    rounds: list[Round] = []
    for seed in range(count):
        answer = decode(small, drafter, prompt, sampling, 3, seed, rule, plan)
        rounds += answer.rounds
        found[answer.tokens] = found.get(answer.tokens, 0) + 1
    worst = 0.0
    for tokens in itertools.product(range(5, 8), repeat=3):
        read = small.forward(torch.tensor([[*prompt, *tokens]]), None)
        probs = processed_probs(small.logits(read.last_hidden_BTH[0]), sampling)
        chance = float(torch.stack([probs[len(prompt) - 1 + i, t] for i, t in enumerate(tokens)]).prod())
        sigma = (chance * (1 - chance) / count) ** 0.5
        worst = max(worst, abs(found.get(tokens, 0) / count - chance) / max(sigma, 1e-9))
    assert worst < 5
    return rounds


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(target: TransformersTarget) -> None:
    drafter = make_drafter(target)
    first, again, other = (
        decode(target, drafter, PROMPTS[2], Sampling(1.0), 20, seed).tokens for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_impossible_requests_are_refused(target: TransformersTarget) -> None:
    with pytest.raises(DataError, match="at least 1"):
        decode(target, None, [], Sampling(0.0), 5)
    with pytest.raises(DataError, match="maximum is 256"):
        decode(target, None, [1] * 250, Sampling(0.0), 20)

"""The verification rules on batches: ragged lengths, temperature zero, and draws that follow the distribution
(exactness itself is proved in test_exactness)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftkit.ops.sampling import Sampling, processed_probs, sample
from draftkit.ops.verify import (
    BLOCK_RULE,
    RULES,
    TOKEN_RULE,
    DenseProposals,
    Rule,
    length_distribution,
    verify,
)

VOCAB = 3


def random_batch(
    requests: int, gamma: int, sharp: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(requests, gamma + 1, VOCAB, generator=generator).double() * sharp, -1)
    q = torch.softmax(torch.randn(requests, gamma, VOCAB, generator=generator).double() * sharp, -1)
    uniforms = torch.rand(requests * gamma, generator=generator, dtype=torch.float64)
    tokens = sample(q.flatten(0, 1), uniforms).view(requests, gamma)
    return tokens, p, q, torch.full((requests,), gamma)


def test_block_verification_accepts_at_least_as_much() -> None:
    """For every draft distribution, averaged over proposals; here over many random ones, and strictly more in
    sum."""
    batch = DenseProposals(*random_batch(20_000, 4, 1.5))
    steps = torch.arange(5, dtype=torch.float64)
    token_wise = (length_distribution(TOKEN_RULE, batch)[0] * steps).sum(-1).mean()
    block = (length_distribution(BLOCK_RULE, batch)[0] * steps).sum(-1).mean()
    assert block > token_wise


def test_the_rules_agree_at_temperature_zero() -> None:
    tokens, p, _, lengths = random_batch(200, 4, 1.0)
    greedy = processed_probs(p.log(), Sampling(0.0))
    one_hot = torch.nn.functional.one_hot(tokens, VOCAB).double()
    for rule in RULES.values():
        verdict = verify(
            rule, DenseProposals(tokens, greedy, one_hot, lengths), torch.rand(200, 2, dtype=torch.float64)
        )
        best = greedy.argmax(-1)
        kept = (tokens == best[:, :4]).long().cumprod(-1).sum(-1)
        assert torch.equal(verdict.accepted_R, kept)
        assert torch.equal(verdict.next_token_R, best[torch.arange(200), kept])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_ragged_lengths_equal_the_shorter_proposal_alone(rule: Rule) -> None:
    tokens, p, q, _ = random_batch(6, 3, 1.5)
    lengths = torch.tensor([0, 1, 2, 3, 1, 0])
    lengths_RG, _ = length_distribution(rule, DenseProposals(tokens, p, q, lengths))
    for r, length in enumerate(lengths.tolist()):
        proposal = DenseProposals(
            tokens[r : r + 1, :length],
            p[r : r + 1, : length + 1],
            q[r : r + 1, :length],
            torch.tensor([length]),
        )
        alone, _ = length_distribution(rule, proposal)
        torch.testing.assert_close(lengths_RG[r, : length + 1], alone[0], atol=1e-14, rtol=0)
        assert float(lengths_RG[r, length + 1 :].sum()) == 0.0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_drawn_verdicts_follow_the_distribution(rule: Rule) -> None:
    tokens, p, q, _ = random_batch(1, 3, 1.5, seed=4)
    count = 40_000
    uniforms = torch.rand(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    proposals = DenseProposals(
        tokens.expand(count, -1), p.expand(count, -1, -1), q.expand(count, -1, -1), torch.full((count,), 3)
    )
    verdict = verify(rule, proposals, uniforms)
    found = torch.bincount(verdict.accepted_R, minlength=4) / count
    wanted, _ = length_distribution(rule, DenseProposals(tokens, p, q, torch.tensor([3])))
    torch.testing.assert_close(found.double(), wanted[0], atol=0.01, rtol=0)


def test_an_impossible_draft_token_is_rejected_without_nan() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    q = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    for rule in RULES.values():
        found, _ = length_distribution(rule, DenseProposals(torch.tensor([[2]]), p, q, torch.tensor([1])))
        assert found.tolist() == [[1.0, 0.0]]


def test_a_uniform_next_to_one_keeps_no_draft_that_cannot_be() -> None:
    """Rounded to float32 it would be 1, above every probability."""
    p_RGV = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    proposals = DenseProposals(torch.tensor([[1]]), p_RGV, torch.tensor([[[0.0, 1.0]]]), torch.tensor([1]))
    verdict = verify(RULES["token"], proposals, torch.tensor([[1 - 2**-53, 0.5]], dtype=torch.float64))
    assert (verdict.accepted_R.tolist(), verdict.next_token_R.tolist()) == ([0], [0])

"""The distribution that is sampled, and the draw from it."""

from __future__ import annotations

import torch

from draftkit.ops.sampling import Sampling, processed_probs, request_generator, sample

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0])


def test_temperature_zero_is_one_hot_at_the_first_largest_logit() -> None:
    assert processed_probs(torch.tensor([1.0, 3.0, 3.0]), Sampling(0.0)).tolist() == [0.0, 1.0, 0.0]


def test_filters_leave_what_they_say_and_sum_to_one() -> None:
    plain = torch.softmax(LOGITS, -1)
    torch.testing.assert_close(processed_probs(LOGITS, Sampling(1.0)), plain)
    top_k = processed_probs(LOGITS, Sampling(1.0, top_k=2))
    torch.testing.assert_close(top_k, torch.tensor([*(plain[:2] / plain[:2].sum()), 0.0, 0.0]))
    top_p = processed_probs(LOGITS, Sampling(1.0, top_p=float(plain[0]) + 0.01))
    assert (top_p > 0).tolist() == [True, True, False, False], "the token that crosses the mass is kept"
    min_p = processed_probs(LOGITS, Sampling(1.0, min_p=0.3))
    assert (min_p > 0).tolist() == [True, True, False, False]
    hot = processed_probs(LOGITS.bfloat16(), Sampling(2.0))
    torch.testing.assert_close(hot, torch.softmax(LOGITS / 2, -1))
    assert hot.dtype == torch.float32


def test_a_draw_never_has_probability_zero_and_follows_the_distribution() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    edges = torch.tensor([0.0, 0.25, 1 - 1e-16], dtype=torch.float64)
    assert sample(probs.expand(3, -1), edges).tolist() == [1, 3, 3]
    uniforms = torch.rand(50_000, generator=request_generator(3), dtype=torch.float64)
    drawn = sample(probs.expand(50_000, -1), uniforms)
    assert abs(float((drawn == 1).double().mean()) - 0.25) < 0.01


def test_generators_differ_by_request_and_repeat_by_seed() -> None:
    first, again, other = (torch.rand(4, generator=request_generator(7, i)) for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)

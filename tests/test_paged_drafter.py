"""The paged drafter proposes what `BlockDrafter.propose` proposes, for many requests of different lengths at
once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftkit.draft.drafter import HEADS
from draftkit.ops.sampling import Sampling
from support.paged_drafter import LENGTHS, build, propose_together


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("layout", ["anchor", "one_plus_n"])
@pytest.mark.parametrize("head", HEADS)
def test_equal_to_the_drafter_for_requests_of_different_lengths(
    head: str, layout: str, dtype: torch.dtype, tolerance: float
) -> None:
    compare(dtype, tolerance, head=head, layout=layout, confidence=head != "none" or layout == "anchor")


@pytest.mark.parametrize(
    "changes",
    [
        {"style": "llama"},
        {"style": "gemma4", "rotary_share": 0.5, "soft_cap": 4.0, "shared_key_value": True},
        {"window": 5, "logit_scale": 0.5, "num_kv_heads": 4},
        {"window": 2, "layout": "one_plus_n"},
        {"draft_vocab_size": 13},
    ],
    ids=["llama", "gemma4", "window", "short-window", "reduced-vocabulary"],
)
def test_equal_to_the_drafter_in_other_styles_and_with_windows(changes: dict[str, Any]) -> None:
    compare(torch.float64, 1e-9, **changes)


def compare(dtype: torch.dtype, tolerance: float, **changes: Any) -> None:
    drafter, fast = build(dtype, **changes)
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(n + 2, 32, generator=generator, dtype=dtype) for n in LENGTHS]
    anchors = [11, 30, 2]
    uniforms_RG = torch.rand(3, fast.gamma, generator=generator, dtype=torch.float64)
    sampling = Sampling(0.8)
    together = propose_together(fast, features, anchors, sampling, uniforms_RG)
    for r, length in enumerate(LENGTHS):
        context = drafter.new_context()
        drafter.extend(context, features[r][None, :length], torch.zeros(1, length, dtype=torch.int64))
        alone = drafter.propose(context, torch.tensor(anchors[r : r + 1]), sampling, uniforms_RG[r : r + 1])
        assert torch.equal(together.tokens_BG[r], alone.tokens_BG[0])
        torch.testing.assert_close(together.probs_BGV[r], alone.probs_BGV[0], atol=tolerance, rtol=tolerance)
        assert (together.confidence_BG is None) == (alone.confidence_BG is None)
        if together.confidence_BG is not None and alone.confidence_BG is not None:
            torch.testing.assert_close(
                together.confidence_BG[r], alone.confidence_BG[0], atol=1e-4, rtol=1e-4
            )


def test_a_draft_leaves_no_trace_in_the_next_one() -> None:
    """The block's own keys lie after the committed positions; drafting twice, or anew after one token, is as
    if alone."""
    _, fast = build()
    generator = torch.Generator().manual_seed(6)
    features = [torch.randn(n + 2, 32, generator=generator) for n in LENGTHS]
    uniforms = torch.zeros(3, fast.gamma, dtype=torch.float64)
    first = propose_together(fast, features, [1, 2, 3], Sampling(0.0), uniforms)
    again = propose_together(fast, features, [1, 2, 3], Sampling(0.0), uniforms)
    other = propose_together(fast, features, [5, 6, 7], Sampling(0.0), uniforms)
    assert torch.equal(first.tokens_BG, again.tokens_BG)
    assert (
        first.confidence_BG is not None
        and again.confidence_BG is not None
        and other.confidence_BG is not None
    )
    assert torch.equal(first.confidence_BG, again.confidence_BG)
    assert not torch.equal(first.confidence_BG, other.confidence_BG)

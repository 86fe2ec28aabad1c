"""The paged drafter proposes what `BlockDrafter.propose` proposes, for many requests of different lengths at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import HEADS, DrafterConfig, Proposal
from draftkit.engine.fast_drafter import FastDrafter
from draftkit.engine.passes import Pass
from draftkit.ops.sampling import Sampling, processed_probs, sample

PAGE = 4
CONFIG = DrafterConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=40,
    feature_layers=(0, 2),
    num_target_layers=4,
    mask_token_id=3,
    block_size=4,
    markov_rank=6,
    max_length=64,
)
LENGTHS = (21, 3, 8)
TABLES = [[7, 2, 9, 11, 0, 5, 6, 20], [1, 3, 12], [8, 4, 10, 19]]  # pages lie anywhere


def build(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[BlockDrafter, FastDrafter]:
    torch.manual_seed(0)
    drafter = BlockDrafter(replace(CONFIG, **changes))
    for name, parameter in drafter.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    for name, buffer in drafter.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    drafter = drafter.to(dtype).eval()
    return drafter, FastDrafter(drafter, slots=24 * PAGE, max_length=40)


def one_pass(tokens: list[list[int]], starts: list[int], dtype: torch.dtype, rows: list[int], block: bool = False) -> Pass:
    width = max(map(len, TABLES))
    return Pass(
        np.concatenate([np.array(t) for t in tokens]),
        np.array(starts),
        np.array([len(t) for t in tokens]),
        np.array([TABLES[r] + [0] * (width - len(TABLES[r])) for r in rows]),
        PAGE,
        torch.device("cpu"),
        dtype,
        block,
    )


def block_pass(anchors: list[int], starts: list[int], config: DrafterConfig, dtype: torch.dtype) -> Pass:
    masks = [config.mask_token_id] * (config.block_size - 1)
    return one_pass([[a, *masks] for a in anchors], starts, dtype, [0, 1, 2], block=True)


def alone(step: Pass, row: int) -> Pass:
    """One request of a pass of blocks."""
    size = int(step.lengths_R[row])
    return Pass(
        step.tokens_T[row * size : (row + 1) * size],
        step.starts_R[row : row + 1],
        step.lengths_R[row : row + 1],
        step.tables_RB[row : row + 1],
        step.block_size,
        step.device,
        step.dtype,
        block=True,
    )


def propose_together(
    fast: FastDrafter, features: list[Tensor], anchors: list[int], sampling: Sampling, uniforms_RG: Tensor
) -> Proposal:
    """All requests at once; the contexts come in two passes, the second with rejected tokens behind the committed."""
    dtype = fast.norm.dtype
    cuts = [5, 0, 2]
    for first, last in ((0, 1), (1, 2)):
        bounds = [(0, cut, n) for cut, n in zip(cuts, LENGTHS, strict=True)]
        rows = [r for r in range(3) if bounds[r][last] > bounds[r][first]]
        pieces = [features[r][bounds[r][first] : bounds[r][last] + (2 if last == 2 else 0)] for r in rows]
        step = one_pass([[0] * len(p) for p in pieces], [bounds[r][first] for r in rows], dtype, rows)
        fast.extend(step, torch.cat(pieces), torch.zeros(len(step), dtype=torch.int64))

    def choose(logits_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
        probs = processed_probs(logits_RV, sampling)
        return sample(probs, uniforms_RG[:, k]), probs

    step = block_pass(anchors, list(LENGTHS), fast.config, dtype)
    return Proposal(*fast.draft(step, torch.tensor(anchors), choose))


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
    ],
    ids=["llama", "gemma4", "window", "short-window"],
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
            torch.testing.assert_close(together.confidence_BG[r], alone.confidence_BG[0], atol=1e-4, rtol=1e-4)


def test_a_draft_leaves_no_trace_in_the_next_one() -> None:
    """The block's own keys lie behind the committed positions; drafting twice, or anew after one token, is as if alone."""
    _, fast = build()
    generator = torch.Generator().manual_seed(6)
    features = [torch.randn(n + 2, 32, generator=generator) for n in LENGTHS]
    uniforms = torch.zeros(3, fast.gamma, dtype=torch.float64)
    first = propose_together(fast, features, [1, 2, 3], Sampling(0.0), uniforms)
    again = propose_together(fast, features, [1, 2, 3], Sampling(0.0), uniforms)
    other = propose_together(fast, features, [5, 6, 7], Sampling(0.0), uniforms)
    assert torch.equal(first.tokens_BG, again.tokens_BG)
    assert first.confidence_BG is not None and again.confidence_BG is not None and other.confidence_BG is not None
    assert torch.equal(first.confidence_BG, again.confidence_BG)
    assert not torch.equal(first.confidence_BG, other.confidence_BG)

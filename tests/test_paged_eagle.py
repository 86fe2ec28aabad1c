"""The paged EAGLE-3 drafter proposes what `EagleDrafter.propose` proposes, for many requests of different
lengths at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from draftkit.draft.eagle3 import EagleDrafter
from draftkit.draft.eagle3_shape import EagleConfig
from draftkit.engine.drawing import Drawing
from draftkit.engine.paged_eagle import PagedEagle
from draftkit.engine.passes import Pass
from draftkit.ops.sampling import Sampling, row_settings

PAGE, GAMMA, HIDDEN, VOCAB = 4, 5, 16, 40
LENGTHS = (21, 3, 8)  # committed tokens of three requests; each one's anchor follows
# pages lie anywhere
TABLES = [[7, 2, 9, 11, 0, 5, 6, 20], [1, 3, 12, 0, 0, 0, 0, 0], [8, 4, 10, 19, 0, 0, 0, 0]]


def make_eagle(**changes: Any) -> EagleDrafter:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    places = {
        "vocab_size": VOCAB,
        "feature_layers": (0, 2),
        "num_target_layers": 4,
        "block_size": GAMMA,
        "max_length": 64,
    }
    drafter = EagleDrafter(EagleConfig(**(sizes | places | changes)))
    for name, parameter in drafter.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    if size := drafter.config.draft_vocab_size:
        drafter.choose_vocabulary(torch.arange(1, VOCAB, 2)[:size], None)
    return drafter.double().eval()


def flat_pass(starts: list[int], lengths: list[int], dtype: torch.dtype = torch.float64) -> Pass:
    tokens = np.zeros(sum(lengths), np.int64)
    return Pass(
        tokens, np.array(starts), np.array(lengths), np.array(TABLES), PAGE, torch.device("cpu"), dtype
    )


def read_together(fast: PagedEagle, features: list[Tensor], following: list[Tensor]) -> None:
    """Every context in two passes; the first one has a rejected token at the end, which the second
    overwrites."""
    cuts = [5, 1, 2]
    for starts, ends, rejected in (([0] * 3, cuts, 1), (cuts, list(LENGTHS), 0)):
        parts = [
            (
                torch.cat([f[a:b], torch.ones(rejected, f.shape[1])]),
                torch.cat([t[a:b], torch.zeros(rejected, dtype=int)]),
            )
            for f, t, a, b in zip(features, following, starts, ends, strict=True)
        ]
        step = flat_pass(starts, [len(f) for f, _ in parts])
        fast.extend(step, torch.cat([f for f, _ in parts]), torch.cat([t for _, t in parts]))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "changes",
    [
        {"style": "llama"},
        {"style": "qwen3", "norm_before_residual": True},
        {"style": "gemma4", "soft_cap": 20.0},
        {"style": "llama", "draft_vocab_size": 12},
    ],
    ids=["llama", "qwen3", "gemma4", "reduced-vocabulary"],
)
def test_proposals_equal_those_of_each_request_alone(changes: dict[str, Any], temperature: float) -> None:
    drafter = make_eagle(**changes)
    fast, sampling = PagedEagle(drafter, slots=24 * PAGE, max_length=40), Sampling(temperature)
    torch.manual_seed(1)
    features = [torch.randn(n, 2 * HIDDEN, dtype=torch.float64) for n in LENGTHS]
    # the token after each; after the last one the anchor
    following = [torch.randint(VOCAB, (n,)) for n in LENGTHS]
    anchors = torch.stack([t[-1] for t in following])
    uniforms_RG = torch.rand(3, GAMMA, dtype=torch.float64)
    read_together(fast, features, following)

    drawing = Drawing(row_settings([sampling] * 3), uniforms_RG.numpy()) if temperature else None
    wanted = fast.drafting_pass(anchors.numpy())
    step = flat_pass([n + wanted.first for n in LENGTHS], [wanted.tokens_RP.shape[1]] * 3)
    tokens, drawn, confidence, largest = fast.draft(step, anchors, drawing)
    assert confidence is None and largest is not None
    for row, (f, t) in enumerate(zip(features, following, strict=True)):
        context = drafter.new_context()
        drafter.extend(context, f[None], t[None])
        alone = drafter.propose(context, anchors[row : row + 1], sampling, uniforms_RG[row : row + 1])
        assert tokens[row].tolist() == alone.tokens_BG[0].tolist()
        torch.testing.assert_close(largest[row], alone.largest_BG[0], atol=1e-10, rtol=1e-10)
        if drawn is not None:
            torch.testing.assert_close(
                drawn.dense().unflatten(0, (3, -1))[row], alone.probs_BGV[0], atol=1e-10, rtol=1e-10
            )


def test_proposals_by_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted on the CPU, beside PyTorch operations: rows that follow each other, one pass for each
    drafted token."""
    paged_attention = pytest.importorskip("draftkit.ops.paged_attention")  # Triton is on Linux alone
    monkeypatch.setattr(paged_attention, "PROGRAMS", 1)
    drafter = make_eagle(head_dim=16).float()
    torch.manual_seed(1)
    features = [torch.randn(n, 2 * HIDDEN) for n in LENGTHS]
    following = [torch.randint(VOCAB, (n,)) for n in LENGTHS]
    anchors = torch.stack([t[-1] for t in following])
    found = []
    for paged in (False, True):
        fast = PagedEagle(drafter, slots=24 * PAGE, max_length=40)
        fast.stack.paged = paged
        read_together(fast, features, following)
        wanted = fast.drafting_pass(anchors.numpy())
        step = flat_pass([n + wanted.first for n in LENGTHS], [wanted.tokens_RP.shape[1]] * 3, torch.float32)
        found.append(fast.draft(step, anchors, None))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][3], found[1][3], atol=1e-5, rtol=1e-4)

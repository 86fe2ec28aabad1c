"""Our Muon takes the steps of PyTorch's, but for rounding: that one iterates in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tools.tiny_target.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    own, other = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours = Muon([own], lr=0.05, weight_decay=0.1)
    theirs = torch.optim.Muon([other], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        own.grad = torch.randn(shape)
        other.grad = own.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(own, other, atol=0.02 * 0.05 * len(own), rtol=0)
        state = theirs.state[other]["momentum_buffer"]
        torch.testing.assert_close(ours.state[own]["momentum_buffer"], state)
    assert (own - 1).abs().max() > 0.05, "it has moved"


def test_singular_values_come_out_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(16, 40)))
    assert values.min() > 0.6 and values.max() < 1.3

"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) with its matrix iteration in float32.

`torch.optim.Muon` iterates in bfloat16, which a CPU without instructions for it emulates a hundred times
slower than it multiplies float32 numbers. Update and state are otherwise the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of X <- a X + b (X X^T) X + c (X X^T)^2 X
STEPS = 5
RMS = 0.2  # root mean square of AdamW's usual update, which ours is scaled to (arXiv 2502.16982)


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(rows, columns)) * orthogonal(g + momentum * (m - g)), for
    matrices W."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                mean = state["momentum_buffer"].lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonal(weight.grad.lerp(mean, MOMENTUM))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * RMS * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the matrix U S V^T: singular values come out between 0.7 and 1.2. float32 [rows,
    columns]."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x

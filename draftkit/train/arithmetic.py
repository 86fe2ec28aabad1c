"""How a processor computes while a drafter is trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from draftkit.ops.native_training import flush_denormals


@contextmanager
def arithmetic(compute: torch.dtype, device: torch.device) -> Iterator[None]:
    """On a CPU: bfloat16 passes are float32 tensors, whose matrix products alone round what they multiply,
    where the processor has instructions for it (AMX, AVX-512 BF16), and add up in float32. Numbers below
    1.2e-38, which gradients by unlikely tokens and distant keys are once a drafter has learnt, count as 0:
    with them a step takes up to three times as long. (Not where nothing can be compiled, or without SSE.)"""
    if device.type != "cpu":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    flushed = flush_denormals(True)
    try:
        if compute == torch.bfloat16:
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        flush_denormals(flushed)
        torch.set_float32_matmul_precision(precision)

"""DeepSeek's number formats: FP8 (e4m3) with one scale per 128 x 128 block, FP4 (e2m1) packed in pairs with
one scale per 32 columns. Scales are powers of two (e8m0) or floats.

Shapes: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

BLOCK, GROUP = 128, 32  # of FP8: rows and columns; of FP4: columns
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0..7; 8..15 are their negatives
FP8_MOST, FP4_MOST = 448.0, 6.0


def dequantise_fp8(weight_OI: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """FP8 [O, I] with scales [ceil(O / 128), ceil(I / 128)] to floats [O, I]."""
    rows, columns = weight_OI.shape
    wide = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight_OI.float() * wide).to(dtype)


def dequantise_fp4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed FP4 [O, I / 2] (even columns in the low half of a byte) with scales [O, I / 32] to floats [O,
    I]."""
    values = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], device=packed.device)
    codes = packed.view(torch.uint8).int()
    columns = torch.stack([values[codes & 15], values[codes >> 4]], -1).flatten(-2)
    return (columns * scale.float().repeat_interleave(GROUP, -1)).to(dtype)


def quantise_fp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest FP8 weight with power-of-two scales: e4m3 [O, I], e8m0 [ceil(O / 128), ceil(I / 128)]."""
    rows, columns = weight_OI.shape
    tall, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = weight_OI.new_zeros(tall * BLOCK, wide * BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight_OI
    largest = padded.view(tall, BLOCK, wide, BLOCK).abs().amax((1, 3))
    scale = _power_of_two(largest / FP8_MOST)
    spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    return (weight_OI.float() / spread).to(torch.float8_e4m3fn), scale.to(torch.float8_e8m0fnu)


def quantise_fp4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest packed FP4 weight with power-of-two scales: int8 [O, I / 2], e8m0 [O, I / 32]."""
    groups = weight_OI.float().unflatten(-1, (-1, GROUP))
    scale = _power_of_two(groups.abs().amax(-1) / FP4_MOST)
    scaled = (groups / scale[..., None]).flatten(-2)
    borders = torch.tensor([(a + b) / 2 for a, b in pairwise(FP4_VALUES)])
    codes = torch.bucketize(scaled.abs(), borders.to(scaled.device)) + 8 * (scaled < 0)
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8).view(torch.int8)
    return packed, scale.to(torch.float8_e8m0fnu)


def _power_of_two(least: Tensor) -> Tensor:
    """The smallest power of two that is not below; 1 for 0."""
    return torch.where(least > 0, torch.exp2(torch.ceil(torch.log2(least.clamp_min(2.0**-126)))), 1.0)

"""Memory straight from the system: in pages of 2 MiB for weights, page by page as it is written for keys and
values.

A pass over one token reads every weight once. In pages of 4 KiB each of them costs a walk through the page
tables, since there are more than a processor keeps in mind (in a virtual machine a walk through two tables);
and how fast a copy of the weights is depends on where its pages happened to lie.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 2 << 20
CHUNK = 16 * PAGE  # bytes asked for at once; only pages that are written are taken
_LINE = 64  # bytes of a cache line


class HugePages:
    """Hands out memory, piece after piece; all of it lives as long as any piece. One thread."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same numbers, contiguous, beginning with a cache line."""
        size = tensor.numel() * tensor.element_size()
        room = -(-size // _LINE) * _LINE
        if room > len(self._left):
            self._left = _reserve(max(room, CHUNK))
        piece, self._left = self._left[:size], self._left[room:]
        return piece.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they have been written: `torch.zeros` writes them all."""
    count = math.prod(shape)
    if not count or not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return torch.zeros(*shape, dtype=dtype)
    return torch.frombuffer(_map(count * dtype.itemsize), dtype=dtype, count=count).view(*shape)


def _reserve(size: int) -> Tensor:
    """Zero bytes from the beginning of a page on, [size]."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.zeros(size, dtype=torch.uint8)
    memory = _map(size + PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:size]


def _map(size: int) -> mmap.mmap:
    """Zero bytes of this process alone."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

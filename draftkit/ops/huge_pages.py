"""Memory in pages of 2 MiB, where the system has them.

A pass over one token reads every weight once. In pages of 4 KiB each of them costs a walk through the page tables, since
there are more than a processor keeps in mind (in a virtual machine a walk through two tables); and how fast a copy of the
weights is depends on where its pages happened to lie.
"""

from __future__ import annotations

import mmap

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


def _reserve(size: int) -> Tensor:
    """Zero bytes from the beginning of a page on, [size]."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:size]

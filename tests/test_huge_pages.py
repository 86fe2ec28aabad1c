"""Copies in pages of 2 MiB are copies, wherever they lie."""

from __future__ import annotations

import psutil
import pytest
import torch

from draftkit.ops import huge_pages
from draftkit.ops.huge_pages import CHUNK, PAGE, HugePages


def test_copies_hold_the_numbers_and_do_not_overlap() -> None:
    pages, rng = HugePages(), torch.Generator().manual_seed(0)
    # one that is left for a new chunk, one larger
    sizes = [(3, 5), (CHUNK // 8 - 1,), (7,), (CHUNK // 4 + 9,), (1, 1, 1)]
    given = [torch.randn(size, generator=rng) for size in sizes]
    given[2] = given[2].bfloat16()
    copies = [pages.copy(tensor) for tensor in given]
    for tensor, copy in zip(given, copies, strict=True):
        assert copy.dtype == tensor.dtype and copy.is_contiguous() and copy.data_ptr() % 64 == 0
        assert torch.equal(copy, tensor)
    copies[0].fill_(0)
    assert all(torch.equal(copy, tensor) for tensor, copy in zip(given[1:], copies[1:], strict=True))


def test_a_copy_outlives_the_pages_that_it_came_from() -> None:
    copy = HugePages().copy(torch.arange(PAGE, dtype=torch.float32)[: PAGE // 2])
    assert copy.sum() == torch.arange(PAGE // 2, dtype=torch.float32).sum()


def test_elsewhere_the_memory_is_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert torch.equal(HugePages().copy(torch.arange(9)), torch.arange(9))


def test_zeros_take_memory_only_where_they_are_written() -> None:
    def held() -> int:
        return psutil.Process().memory_info().rss

    before = held()
    memory = huge_pages.zeros((2**20, 64), torch.float32)  # 256 MiB
    assert memory.shape == (2**20, 64) and not memory[2**19].any() and held() - before < 16 * 2**20
    memory[-1] = 1
    assert memory.sum() == 64 and huge_pages.zeros((0, 3), torch.float32).shape == (0, 3)

"""How a processor computes while a drafter is trained on it."""

from __future__ import annotations

import pytest
import torch

from draftkit.ops import native_training
from draftkit.ops.native_training import flush_denormals
from draftkit.train.arithmetic import arithmetic

CPU = torch.device("cpu")


def zeros() -> float:
    """The share of zeros among products of 1e-39, in as many numbers as two threads share."""
    small = torch.full((1 << 20,), 1e-30)
    return float((small * torch.full_like(small, 1e-9) == 0).float().mean())


@pytest.fixture
def two_threads():  # type: ignore[no-untyped-def]
    """PyTorch with two threads, which exist before a training begins."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    zeros()
    yield
    torch.set_num_threads(before)


def test_denormals_are_zero_in_every_thread_and_only_inside(two_threads: None) -> None:
    assert zeros() == 0
    with arithmetic(torch.float32, CPU):
        assert zeros() == 1
    assert zeros() == 0


def test_without_compiled_functions_nothing_changes(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_training, "training_library", lambda: None)
    with arithmetic(torch.float32, CPU):
        assert zeros() == 0
    assert zeros() == 0


def test_who_wanted_them_as_zero_keeps_that(two_threads: None) -> None:
    flush_denormals(True)
    try:
        with arithmetic(torch.float32, CPU):
            pass
        assert zeros() == 1
    finally:
        flush_denormals(False)
    assert zeros() == 0


def test_they_count_again_after_an_error(two_threads: None) -> None:
    with pytest.raises(RuntimeError), arithmetic(torch.bfloat16, CPU):
        raise RuntimeError
    assert zeros() == 0
    assert torch.get_float32_matmul_precision() == "highest"

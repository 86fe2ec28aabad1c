"""The kernels of a GPU, interpreted on the CPU, equal what the layers do in PyTorch operations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from draftkit.engine.passes import LONG_QUERY, PagedPass, Pass, flatten
from draftkit.engine.stack import AttentionShape, Layer, Stack, StackShape, rms_norm, rotary_table

paged_attention = pytest.importorskip("draftkit.ops.paged_attention")  # Triton is on Linux alone
BLOCK, SLOTS, HIDDEN = 4, 64, 24
TABLES = np.array([[5, 2, 9, 11, 0, 6, 14, 15], [1, 3, 12, 0, 0, 0, 0, 0], [8, 4, 10, 7, 13, 0, 0, 0]])
STARTS = np.array([21, 0, 8])
PLAIN = AttentionShape(heads=4, kv_heads=2, head_dim=16, scale=0.25)
CASES = {
    "grouped": PLAIN,
    "single": replace(PLAIN, kv_heads=4),
    "of three": replace(PLAIN, heads=6),
    "window": replace(PLAIN, window=6),
    "cap": replace(PLAIN, score_cap=2.0),
    "value norm": replace(PLAIN, value_norm=True, head_dim=32),
}


@pytest.fixture(autouse=True)
def no_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU runs the programs of a kernel one after the other."""
    monkeypatch.setattr(paged_attention, "PROGRAMS", 1)


def stack(shape: AttentionShape, norms: bool = True, dtype: torch.dtype = torch.float32) -> Stack:
    """One layer of random weights over a memory that is full of other requests' numbers."""
    generator = torch.Generator().manual_seed(0)

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    rotary = rotary_table(48, 100.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim), 1.0, dtype)
    layer = Layer(
        attention=shape,
        rotary=rotary,
        input_norm=weight(HIDDEN),
        qkv=weight(width, HIDDEN) * 0.3,
        qkv_bias=None,
        qk_norm=weight(shape.heads + shape.kv_heads, shape.head_dim) if norms else None,
        out=weight(HIDDEN, shape.heads * shape.head_dim),
        out_bias=None,
        post_attention_norm=None,
        mlp_norm=weight(HIDDEN),
        gate_up=weight(8, HIDDEN),
        down=weight(HIDDEN, 4),
        mlp_out_norm=None,
        output_scale=1.0,
    )
    made = Stack(StackShape(HIDDEN, 1e-6), (layer,), SLOTS)
    made.memory[0].copy_(weight(*made.memory[0].shape))
    return made


def one_pass(lengths: list[int], block: bool = False) -> Pass:
    tokens = np.arange(sum(lengths))
    return Pass(tokens, STARTS, np.array(lengths), TABLES, BLOCK, torch.device("cpu"), torch.float32, block)


def compare(shape: AttentionShape, step: Pass, paged: PagedPass, norms: bool = True) -> None:
    """Layer outputs and memories of both ways."""
    x = torch.randn(len(paged), HIDDEN, generator=torch.Generator().manual_seed(1))
    operations, kernels = stack(shape, norms), stack(shape, norms)
    wanted, _ = operations.run(x[: len(step)], step)
    found, _ = kernels.run(x, paged)
    torch.testing.assert_close(found[: len(step)], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kernels.memory[0][:SLOTS], operations.memory[0][:SLOTS], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_rounds_of_different_lengths(name: str) -> None:
    step = one_pass([5, 1, 2])
    compare(CASES[name], step, PagedPass.of(step), norms=name != "cap")


def test_keys_split_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer keys than splits, too: some of them see nothing. Keys are few at a time, so that there are
    several shares."""
    monkeypatch.setattr(paged_attention, "PROGRAMS", 64)
    monkeypatch.setattr(paged_attention, "WIDE_KEYS", 16)
    step = one_pass([1, 1, 1])
    compare(replace(PLAIN, window=19), step, PagedPass.of(step))


def test_a_drafters_block_sees_all_of_itself() -> None:
    step = one_pass([4, 4, 4], block=True)
    compare(replace(PLAIN, window=5), step, PagedPass.of(step))


def test_a_prompt_is_read_in_larger_tiles() -> None:
    step = Pass(
        np.arange(LONG_QUERY + 4), np.array([3, 2]), np.array([LONG_QUERY + 1, 3]),
        np.stack([np.arange(10), np.r_[10, 11, np.zeros(8, np.int64)]]),
        BLOCK, torch.device("cpu"), torch.float32,
    )  # fmt: skip
    paged = PagedPass.of(step)
    assert paged.tile == 16 and not paged.split
    compare(PLAIN, step, paged)


def test_padding_changes_nothing() -> None:
    step = one_pass([3, 1, 2])
    filled = torch.from_numpy(flatten(step, 12, 12, 4, SLOTS))
    compare(PLAIN, step, PagedPass(filled, 12, 12, 4, BLOCK))


@pytest.mark.parametrize("gelu", [False, True])
def test_norms_and_gates_of_odd_widths(gelu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "COLUMNS", 16)
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(3, 40, generator=generator), torch.randn(40, generator=generator)
    torch.testing.assert_close(paged_attention.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))
    gate, up = x.chunk(2, -1)
    wanted = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    torch.testing.assert_close(paged_attention.gated(x, gelu), wanted)

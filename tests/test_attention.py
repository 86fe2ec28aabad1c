"""Block attention without masks equals attention with a dense one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from draftkit.ops import attention, native_training
from draftkit.ops.attention import (
    BlockPlan,
    block_attention,
    flex_block_attention,
    flex_fits,
    flex_mask,
    plan_blocks,
)

GAMMA, KEYS, HEADS, KV_HEADS, SIZE = 3, 40, 4, 2, 8
# three documents: keys [0, 11), [11, 30), [30, 40); the second is seen through a window, a block of the third
# sees nothing
STARTS = torch.tensor([0, 0, 0, 11, 13, 18, 19, 30, 30])
STOPS = torch.tensor([2, 7, 11, 14, 17, 22, 30, 30, 38])
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
QUERIES = GAMMA * len(STARTS)


def tensors(grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((QUERIES, HEADS), (QUERIES, KV_HEADS), (QUERIES, KV_HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS))
    return [torch.randn(*s, SIZE, generator=generator).requires_grad_(grad) for s in shapes]


def dense(q: Tensor, own_k: Tensor, own_v: Tensor, seen_k: Tensor, seen_v: Tensor, scale: float) -> Tensor:
    """One [Q, C + Q] mask and one softmax."""
    mask = torch.zeros(QUERIES, KEYS + QUERIES, dtype=torch.bool)
    for x in range(len(STARTS)):
        rows = slice(x * GAMMA, (x + 1) * GAMMA)
        mask[rows, STARTS[x] : STOPS[x]] = True
        mask[rows, KEYS + x * GAMMA : KEYS + (x + 1) * GAMMA] = True
    k, v = (
        torch.cat([s, o]).repeat_interleave(HEADS // KV_HEADS, 1)
        for s, o in ((seen_k, own_k), (seen_v, own_v))
    )
    scores = torch.einsum("qnd,knd->nqk", q, k) * scale
    return torch.einsum("nqk,knd->qnd", torch.softmax(scores.masked_fill(~mask, float("-inf")), -1), v)


def plan() -> BlockPlan:
    return plan_blocks(STARTS, STOPS, DOCUMENTS, GAMMA, KEYS, SIZE)


@pytest.fixture(params=["C++", "operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the ways to the result on a CPU; the other one must not be taken."""
    other = "_GroupedAttention" if request.param == "C++" else "NativeBlockAttention"
    monkeypatch.setattr(attention, other, None)
    if request.param == "operations":
        monkeypatch.setattr(native_training, "training_library", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("blocks_at_once", [1, 2, 16])
@pytest.mark.parametrize("scale", [SIZE**-0.5, 1.0])
def test_groups_equal_the_dense_mask_in_values_and_gradients(
    blocks_at_once: int, scale: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GROUP_BLOCKS", blocks_at_once)
    q, own_k, own_v, seen_k, seen_v = inputs = tensors()
    weights = torch.randn(QUERIES, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    found = block_attention(q, (own_k, own_v), (seen_k, seen_v), plan(), scale)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    wanted = dense(*inputs, scale)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for mine, autograd in zip(gradients, torch.autograd.grad((wanted * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, autograd, atol=1e-5, rtol=1e-5)


def test_groups_stay_within_documents_and_meet_no_key_after_their_last_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "GROUP_BLOCKS", 3)
    groups = plan().groups
    found = [(g.queries.start, g.queries.stop, g.start, g.stop) for g in groups]
    assert found == [(0, 9, 0, 11), (9, 18, 11, 22), (18, 21, 19, 30), (21, 27, 30, 38)]
    assert groups[2].front.shape[-1] == 0 and not groups[2].back.any()  # one block alone needs no mask


def test_threads_change_no_bit() -> None:
    weights = torch.randn(QUERIES, HEADS, SIZE, generator=torch.Generator().manual_seed(1))

    def run() -> list[Tensor]:
        q, own_k, own_v, seen_k, seen_v = inputs = tensors()
        found = block_attention(q, (own_k, own_v), (seen_k, seen_v), plan(), 1.0)
        return [found, *torch.autograd.grad((found * weights).sum(), inputs)]

    threads = torch.get_num_threads()
    try:
        results = [run() for count in (1, 2, 3) if torch.set_num_threads(count) is None]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("own", [0, 1, 4])
def test_a_block_of_one_query_may_have_other_numbers_of_own_keys(own: int, way: str) -> None:
    """As a drafter has that is unrolled: no own key in its first step, one more in each later one."""
    blocks, stops = len(STARTS), torch.maximum(STOPS, STARTS + 1)
    generator = torch.Generator().manual_seed(2)
    shapes = ((blocks, HEADS), *[(blocks * own, KV_HEADS)] * 2, *[(KEYS, KV_HEADS)] * 2)
    q, own_k, own_v, seen_k, seen_v = inputs = [
        torch.randn(*s, SIZE, generator=generator).requires_grad_() for s in shapes
    ]
    found = block_attention(
        q,
        (own_k, own_v),
        (seen_k, seen_v),
        plan_blocks(STARTS, stops, DOCUMENTS, 1, KEYS, SIZE, own=own),
        0.5,
    )
    rows = []
    for x in range(blocks):
        part, mine = slice(int(STARTS[x]), int(stops[x])), slice(x * own, (x + 1) * own)
        k, v = (
            torch.cat([s[part], o[mine]]).repeat_interleave(2, 1)
            for s, o in ((seen_k, own_k), (seen_v, own_v))
        )
        rows.append(
            torch.einsum("nk,knd->nd", torch.softmax(0.5 * torch.einsum("nd,knd->nk", q[x], k), -1), v)
        )
    wanted = torch.stack(rows)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for mine, autograd in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(wanted.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, autograd, atol=1e-5, rtol=1e-5)
    q, own_k, own_v, seen_k, seen_v = (t.detach() for t in inputs)
    flexible = flex_block_attention(
        q, (own_k, own_v), (seen_k, seen_v), flex_mask(STARTS, stops, 1, KEYS, own), 0.5
    )
    torch.testing.assert_close(flexible, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_masks_the_same_keys() -> None:
    """Without a GPU flex_attention runs as plain operations, forward only; the mask is the one its kernels
    get."""
    q, own_k, own_v, seen_k, seen_v = inputs = tensors(grad=False)
    mask = flex_mask(STARTS, STOPS, GAMMA, KEYS, GAMMA)
    found = flex_block_attention(q, (own_k, own_v), (seen_k, seen_v), mask, 0.5)
    torch.testing.assert_close(found, dense(*inputs, 0.5), atol=1e-5, rtol=1e-5)


def test_flex_attention_is_used_where_its_kernels_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_memory(size: int) -> None:
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(shared_memory_per_block_optin=size),
        )

    cuda = torch.device("cuda")
    assert not flex_fits(torch.device("cpu"), 128)
    with_memory(232_448)  # H100
    assert flex_fits(cuda, 128)
    assert not flex_fits(cuda, 512)
    with_memory(101_376)  # RTX 4090
    assert not flex_fits(cuda, 128)

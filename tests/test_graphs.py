"""Recorded passes: a recording that only ever sees its own tensors gives the numbers of the pass itself.

Here "recording" keeps the function and runs it again on the same tensors, and Triton interprets the kernels
on the CPU; what CUDA adds to that needs a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from draftkit.engine.compiled import record_passes
from draftkit.engine.drawing import Drawn
from draftkit.engine.graphs import Play, RecordedPasses, padded, sizes
from draftkit.engine.paged_drafter import PagedBlockDrafter
from draftkit.ops.sampling import Sampling
from support.paged_drafter import LENGTHS, propose_together
from support.paged_drafter import build as build_drafter
from support.paged_target import build, one_pass

paged_attention = pytest.importorskip("draftkit.ops.paged_attention")  # Triton is on Linux alone
TEXTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (14, 6, 9)]
TABLES = [[5, 30, 2, 17], [1, 4, 6], [8, 10, 11, 13]]
WIDEST = 8


class Recorder:
    """Counts recordings; playing runs the recorded function again."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Play) -> Play:
        self.count += 1
        return run


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU runs the programs of a kernel one after the other."""
    monkeypatch.setattr(paged_attention, "PROGRAMS", 1)


def drafter_on_pages(**changes: object) -> PagedBlockDrafter:
    _, fast = build_drafter(head_dim=16, **changes)
    fast.stack.paged = True
    return fast


@pytest.mark.slow
def test_recorded_passes_of_the_target_equal_the_eager_ones() -> None:
    """Prompts first, then rounds whose requests read 1 to 4 tokens each: two sizes, as far as recordings are
    concerned."""
    _, eager = build("gemma3")  # of all families the one with most parts
    _, fast = build("gemma3")
    fast.stack.paged = True
    recorder = Recorder()
    record_passes(fast, None, (0, 1), WIDEST, recorder)
    starts = [8, 2, 3]
    for model in (eager, fast):
        pieces = [(t[:s], 0, b) for t, s, b in zip(TEXTS, starts, TABLES, strict=True)]
        model.read(one_pass(pieces), torch.tensor([7, 9, 12]), (0, 1))
    assert recorder.count == 0  # rows of logits are chosen: not recorded
    for lengths in ([1, 1, 1], [4, 1, 2], [1, 2, 1]):
        pieces = [
            (t[s : s + n], s, b[: -(-(s + n) // 4)])
            for t, s, n, b in zip(TEXTS, starts, lengths, TABLES, strict=True)
        ]
        wanted, played = (model.read(one_pass(pieces), None, (0, 1)) for model in (eager, fast))
        assert len(played.logits_WV) == sum(lengths) and wanted.features_TF is not None
        torch.testing.assert_close(played.logits_WV, wanted.logits_WV, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(played.features_TF, wanted.features_TF, atol=1e-4, rtol=1e-4)
        starts = [s + n for s, n in zip(starts, lengths, strict=True)]
    # 4 and 8 tokens
    assert recorder.count == 2 and fast.recorded is not None and fast.recorded.reason is None


def test_features_outlive_the_next_pass() -> None:
    """What the drafter has yet to read is kept, while the recording's own tensors are overwritten."""
    _, fast = build("qwen3")
    fast.stack.paged = True
    record_passes(fast, None, (0,), WIDEST, Recorder())
    first = fast.read(one_pass([([1, 2], 0, [5])]), None, (0,)).features_TF
    assert first is not None
    before = first.clone()
    fast.read(one_pass([([3, 4], 2, [5])]), None, (0,))
    assert torch.equal(first, before)


def test_a_model_that_is_given_up_frees_its_memory_in_spite_of_its_recordings() -> None:
    fast = build("qwen3")[1]
    fast.stack.paged = True
    record_passes(fast, None, (), WIDEST, Recorder())
    fast.read(one_pass([([1, 2], 0, [5])]), None)
    memory = weakref.ref(fast.stack.memory[0])
    gc.disable()
    try:
        del fast
        assert memory() is None
    finally:
        gc.enable()


def test_padding_writes_to_the_spare_slot_alone() -> None:
    _, fast = build("qwen3")
    fast.stack.paged = True
    record_passes(fast, None, (), WIDEST, Recorder())
    for memory in fast.stack.memory:
        memory.zero_()
    fast.read(one_pass([([1, 2, 3], 0, [5]), ([4], 0, [7]), ([6], 0, [9])]), None)
    for memory in fast.stack.memory:
        written = memory.flatten(1).abs().sum(-1).nonzero().squeeze(-1).tolist()
        assert written == [20, 21, 22, 28, 36, fast.stack.slots]


def test_recorded_blocks_and_contexts_equal_the_eager_ones() -> None:
    """The way along the head is not recorded where tokens are drawn."""
    _, eager = build_drafter(head_dim=16, layout="one_plus_n")
    fast, recorder = drafter_on_pages(layout="one_plus_n"), Recorder()
    record_passes(build("qwen3")[1], fast, (0, 1), WIDEST, recorder)
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(n + 2, 32, generator=generator) for n in LENGTHS]
    uniforms_RG = torch.rand(3, fast.gamma, generator=generator, dtype=torch.float64)
    wanted, played = (
        propose_together(d, features, [11, 30, 2], Sampling(0.8), uniforms_RG) for d in (eager, fast)
    )
    assert torch.equal(played.tokens_BG, wanted.tokens_BG)
    torch.testing.assert_close(played.confidence_BG, wanted.confidence_BG, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(played.probs_BGV, wanted.probs_BGV, atol=1e-5, rtol=1e-4)
    assert (
        fast.recorded is not None
        and fast.recorded.block.reason is None
        and fast.recorded.context.reason is None
    )
    assert len(fast.recorded.block._recordings) == 1 and len(fast.recorded.context._recordings) == 2
    assert recorder.count == 3


@pytest.mark.slow
@pytest.mark.parametrize("head", ["markov", "rnn"])
def test_the_greedy_way_along_the_head_is_recorded_whole(head: str) -> None:
    _, eager = build_drafter(head_dim=16, head=head)
    fast = drafter_on_pages(head=head)
    record_passes(build("qwen3")[1], fast, (0, 1), WIDEST, Recorder())
    for anchors in ([11, 30, 2], [7]):
        wanted = drafts(eager, anchors)
        played = drafts(fast, anchors)
        # greedy: no probabilities
        assert torch.equal(played[0], wanted[0]) and played[1] is None and wanted[1] is None
        torch.testing.assert_close(played[2], wanted[2], atol=1e-5, rtol=1e-4)
    assert (
        fast.recorded is not None
        and fast.recorded.greedy.reason is None
        and len(fast.recorded.greedy._recordings) == 2
    )


def drafts(fast: PagedBlockDrafter, anchors: list[int]) -> tuple[Tensor, Drawn | None, Tensor | None]:
    """Greedy proposals after empty contexts."""
    wanted = fast.drafting_pass(torch.tensor(anchors).numpy())
    step = one_pass([(row.tolist(), 0, [2 * i, 2 * i + 1]) for i, row in enumerate(wanted.tokens_RP)])
    step.block = True
    tokens, drawn, confidence, _ = fast.draft(step, torch.tensor(anchors), None)
    return tokens, drawn, confidence


def test_sizes_are_close_to_what_comes_and_wide_tables_are_not_recorded() -> None:
    assert [padded(n) for n in (1, 2, 3, 5, 8, 9, 12, 13, 17, 24, 25, 100)] == [
        1,
        2,
        4,
        8,
        8,
        12,
        12,
        16,
        24,
        24,
        32,
        128,
    ]
    assert sizes(20) == [24, 16, 12, 8, 4, 2, 1]
    _, fast = build("qwen3")
    fast.stack.paged = True
    recorder = Recorder()
    record_passes(fast, None, (), 2, recorder)
    fast.read(one_pass([([1], 9, [3, 4, 5])]), None)
    assert recorder.count == 0


def test_a_recording_that_fails_or_differs_is_not_used() -> None:
    def refuse(run: Play) -> Play:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def spoiling(recorded: Callable[[], RecordedPasses | None]) -> Callable[[Play], Play]:
        def spoil(run: Play) -> Play:
            def play() -> None:
                run()
                passes = recorded()
                assert passes is not None
                passes._outputs[0].mul_(1.01)

            return play

        return spoil

    pieces = [(TEXTS[0][:4], 0, TABLES[0][:1])]
    wanted = build("qwen3")[1].read(one_pass(pieces), None)
    for name, reason in (("refuse", "not permitted"), ("spoil", "differs from its pass")):
        _, fast = build("qwen3")
        fast.stack.paged = True
        record_passes(
            fast, None, (), WIDEST, refuse if name == "refuse" else spoiling(lambda f=fast: f.recorded)
        )
        assert fast.recorded is not None
        for _ in range(2):
            torch.testing.assert_close(
                fast.read(one_pass(pieces), None).logits_WV, wanted.logits_WV, atol=1e-4, rtol=1e-4
            )
            assert reason in str(fast.recorded.reason) and "\n" not in str(fast.recorded.reason)

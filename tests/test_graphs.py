"""Recorded passes of fixed shapes: a recording that reads only its own tensors gives the numbers of the pass itself.

Here "recording" keeps the function and runs it again on the same tensors; what CUDA adds to that needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from test_fast_drafter import LENGTHS, block_pass, propose_together
from test_fast_drafter import build as build_drafter
from test_fast_model import build, one_pass

from draftkit.engine.compiled import record_passes
from draftkit.engine.graphs import Outputs, RecordedPasses, Rectangle
from draftkit.ops.sampling import Sampling

TEXTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (50, 9, 23)]
TABLES = [[5, 30, 2, 17, 9, 33, 0, 21, 12, 3, 7, 26, 14], [1, 4, 6], [8, 10, 11, 13, 15, 16]]


class Recorder:
    """Counts recordings; playing runs the recorded function again."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        self.count += 1
        return run


def test_recorded_passes_of_the_target_equal_the_eager_ones() -> None:
    """Prompts in one long pass (not recorded), then rounds whose requests read 1 to 4 tokens each."""
    for family in ("qwen3", "gemma3"):
        _, eager = build(family)
        _, fast = build(family)
        recorder = Recorder()
        fast.recorded = RecordedPasses(lambda fixed, f=fast: f.forward(fixed, None, (0, 1)), fast.stack.slots, recorder)
        starts = [36, 2, 9]
        for model in (eager, fast):
            model.read(one_pass([(t[:s], 0, b) for t, s, b in zip(TEXTS, starts, TABLES, strict=True)]), None, (0, 1))
        assert recorder.count == 0
        for lengths in ([1, 1, 1], [4, 1, 2], [4, 2, 4], [1, 1, 1]):
            pieces = [
                (t[s : s + n], s, b[: -(-(s + n) // 4)]) for t, s, n, b in zip(TEXTS, starts, lengths, TABLES, strict=True)
            ]
            step = one_pass(pieces)
            wanted, played = eager.read(step, None, (0, 1)), fast.read(one_pass(pieces), torch.tensor([0, 2]), (0, 1))
            torch.testing.assert_close(played.logits_WV, wanted.logits_WV[[0, 2]], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(played.features_TF, wanted.features_TF, atol=1e-4, rtol=1e-4)
            starts = [s + n for s, n in zip(starts, lengths, strict=True)]
        assert recorder.count == 2 and fast.recorded.reason is None  # 4 x 1 and 4 x 4 tokens


def test_padding_writes_to_the_spare_slot_alone() -> None:
    _, fast = build("qwen3")
    record_passes(fast, None, Recorder())
    for memory in fast.stack.memory:
        memory.zero_()
    fast.read(one_pass([([1, 2, 3], 0, [5]), ([4], 0, [7]), ([6], 0, [9])]), None)
    for memory in fast.stack.memory:
        written = memory.flatten(1).abs().sum(-1).nonzero().squeeze(-1).tolist()
        assert written == [20, 21, 22, 28, 36, fast.stack.slots]


def test_recorded_drafting_equals_the_eager_one() -> None:
    for layout in ("anchor", "one_plus_n"):
        _, fast = build_drafter(layout=layout)
        generator = torch.Generator().manual_seed(5)
        features = [torch.randn(n + 2, 32, generator=generator) for n in LENGTHS]
        uniforms_RG = torch.rand(3, fast.gamma, generator=generator, dtype=torch.float64)
        eager = propose_together(fast, features, [11, 30, 2], Sampling(0.8), uniforms_RG)
        recorder = Recorder()
        record_passes(build("qwen3")[1], fast, recorder)
        for _ in range(2):
            played = propose_together(fast, features, [11, 30, 2], Sampling(0.8), uniforms_RG)
            assert torch.equal(played.tokens_BG, eager.tokens_BG)
            torch.testing.assert_close(played.probs_BGV, eager.probs_BGV, atol=1e-5, rtol=1e-4)
        assert recorder.count == 1


def test_shapes_are_powers_of_two_and_long_pieces_are_not_recorded() -> None:
    _, drafter = build_drafter()
    shape = Rectangle.around(block_pass([1, 2, 3], list(LENGTHS), drafter.config, torch.float32))
    assert shape == Rectangle(requests=4, queries=4, blocks=8, block_size=4)
    assert Rectangle.around(one_pass([(TEXTS[0][:33], 0, TABLES[0])])) is None


def test_a_recording_that_fails_or_differs_is_not_used() -> None:
    def refuse(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def spoil(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        return lambda: tuple(output * 1.01 for output in run())

    pieces = [(TEXTS[0][:4], 0, TABLES[0][:1])]
    wanted = build("qwen3")[1].read(one_pass(pieces), None)
    for record, reason in ((refuse, "not permitted"), (spoil, "differs from its pass")):
        _, fast = build("qwen3")
        record_passes(fast, None, record)
        assert fast.recorded is not None
        for _ in range(2):
            assert torch.equal(fast.read(one_pass(pieces), None).logits_WV, wanted.logits_WV)
            assert reason in str(fast.recorded.reason) and "\n" not in str(fast.recorded.reason)

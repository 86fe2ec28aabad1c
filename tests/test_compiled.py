"""The C++ pass gives the eager pass's numbers, for every family and drafter, and every token's own to the
bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftkit.engine.compiled import _compare, compile_passes
from draftkit.engine.native import FLOATS, HALVES, TILES, NativeStack, pack_panels
from draftkit.ops.native_build import NoNative
from draftkit.ops.sampling import Sampling
from support.drafters import BLOCK_CONFIG
from support.paged_drafter import LENGTHS, alone, block_pass, propose_together
from support.paged_drafter import build as build_drafter
from support.paged_target import FAMILIES, TABLES, TEXTS, build, one_pass


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiled_pass_equals_the_eager_one(family: str) -> None:
    _, fast = build(family)
    native = NativeStack(fast.stack, fast.ends)
    step = one_pass([(text, 0, table) for text, table in zip(TEXTS, TABLES, strict=True)])
    eager = fast.read(step, None, (0, 1))
    for memory in fast.stack.memory:
        memory.zero_()
    best_W = np.empty(len(step), np.int64)
    logits, _, features = native.run(step, np.arange(len(step)), (0, 1), best_W)
    torch.testing.assert_close(logits, eager.logits_WV, atol=1e-4, rtol=1e-4)
    assert best_W.tolist() == logits.argmax(-1).tolist()
    assert features is not None and eager.features_TF is not None
    torch.testing.assert_close(features, eager.features_TF, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_tokens_logits_are_the_same_to_the_bit_in_any_batch_and_any_cut(family: str, threads: int) -> None:
    """So the same request gives the same answer alone, beside others, with a drafter or without."""
    _, fast = build(family)
    fast.native = NativeStack(fast.stack, fast.ends)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = one_pass([(text, 0, table) for text, table in zip(TEXTS, TABLES, strict=True)])
        together = fast.read(step, None).logits_WV
        for (first, last), text, table in zip(
            zip(step.firsts_R, step.ends_R, strict=True), TEXTS, TABLES, strict=True
        ):
            for size in (1, 4, 7):
                cuts = range(0, len(text), size)
                pieces = [fast.read(one_pass([(text[i : i + size], i, table)]), None).logits_WV for i in cuts]
                assert torch.equal(torch.cat(pieces), together[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_size": 77, "confidence_with_markov": False},
        {"head": "none", "confidence": False},
        {"head": "gated", "confidence": False},
        {"head": "rnn"},
        {"draft_vocab_size": 13},
    ],
    ids=["markov", "odd-vocabulary", "none", "gated", "rnn", "reduced-vocabulary"],
)
def test_compiled_greedy_drafting_takes_what_the_eager_one_takes(
    changes: dict[str, Any], threads: int
) -> None:
    _, fast = build_drafter(**changes)
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(n + 2, 32, generator=generator) for n in LENGTHS]
    uniforms_RG = torch.zeros(3, fast.gamma, dtype=torch.float64)
    eager = propose_together(fast, features, [11, 30, 2], Sampling(0.0), uniforms_RG)
    assert compile_passes(build("qwen3")[1], fast) is None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = block_pass([11, 30, 2], list(LENGTHS), fast.config, torch.float32)
        tokens, drawn, confidence, largest = fast.draft(step, torch.tensor([11, 30, 2]), None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(tokens, eager.tokens_BG) and drawn is None
    assert (confidence is None) == (eager.confidence_BG is None)
    for found, wanted in ((confidence, eager.confidence_BG), (largest, eager.largest_BG)):
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (confidence is None) != (largest is None)


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "one_plus_n", "block_size": 7},
        {
            "style": "gemma4",
            "rotary_share": 0.5,
            "soft_cap": 4.0,
            "shared_key_value": True,
            "logit_scale": 0.5,
        },
        {"style": "llama", "window": 5, "num_kv_heads": 4, "head": "rnn"},
        {"head": "gated"},
        {"draft_vocab_size": 13},
    ],
    ids=["one_plus_n", "gemma4", "llama-window-rnn", "gated", "reduced-vocabulary"],
)
def test_the_compiled_drafter_equals_the_eager_one(changes: dict[str, Any]) -> None:
    _, fast = build_drafter(**changes)
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(n + 2, 32, generator=generator) for n in LENGTHS]
    uniforms_RG = torch.rand(3, fast.gamma, generator=generator, dtype=torch.float64)
    eager = propose_together(fast, features, [11, 30, 2], Sampling(0.8), uniforms_RG)
    for memory in fast.stack.memory:
        memory.zero_()
    assert compile_passes(build("qwen3")[1], fast) is None
    assert fast.native is not None
    compiled = propose_together(fast, features, [11, 30, 2], Sampling(0.8), uniforms_RG)
    assert torch.equal(eager.tokens_BG, compiled.tokens_BG)
    torch.testing.assert_close(eager.probs_BGV, compiled.probs_BGV, atol=1e-4, rtol=1e-4)
    assert eager.confidence_BG is not None and compiled.confidence_BG is not None
    torch.testing.assert_close(eager.confidence_BG, compiled.confidence_BG, atol=1e-4, rtol=1e-4)


def test_bfloat16_numbers_are_packed_as_such_and_others_are_not_rounded() -> None:
    weight = torch.randn(20, 8)
    rounded = weight.to(torch.bfloat16).float()
    assert torch.equal(pack_panels(weight, FLOATS)[0, 3], weight[:16, 3])
    packed = pack_panels(rounded, HALVES)
    assert packed.dtype == torch.bfloat16 and packed.shape == (2, 8, 8, 2)
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert torch.equal(packed[0, 3].flatten().float(), rounded[order, 3])
    tiles = pack_panels(rounded, TILES)
    assert tiles.dtype == torch.bfloat16 and tiles.shape == (2, 1, 16, 16, 2)
    assert torch.equal(tiles[1, 0, 3, 2].float(), rounded[18, 6:8]) and not tiles[:, :, 4:].any()
    _, fast = build("qwen3")
    assert {layer.qkv.kind for layer in NativeStack(fast.stack, fast.ends)._layers} == {FLOATS}
    for layer in fast.stack.layers:
        for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
            matrix.copy_(matrix.to(torch.bfloat16))
    step = one_pass([(TEXTS[0], 0, TABLES[0])])
    eager = fast.read(step, None).logits_WV
    fast.native = NativeStack(fast.stack, fast.ends)
    assert {layer.qkv.kind for layer in fast.native._layers} <= {HALVES, TILES}
    torch.testing.assert_close(fast.read(step, None).logits_WV, eager, atol=1e-4, rtol=1e-4)


def test_without_a_compiler_or_with_a_broken_one_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _, fast = build("qwen3")
    assert compile_passes(fast) == "no C++ compiler found (g++, clang++ or $CXX)"
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    broken.chmod(0o755)
    assert compile_passes(fast) == f"{broken} failed: no space left"
    assert fast.native is None


def test_what_does_not_fit_the_compiled_pass_is_said() -> None:
    _, wide = build("qwen3", torch.float64)
    with pytest.raises(NoNative, match=r"computes in float32 or bfloat16, not torch\.float64"):
        NativeStack(wide.stack, wide.ends)


def test_a_compiled_pass_with_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "draftkit.engine.native.pack_panels", lambda weight, kind: pack_panels(weight * 1.1, kind)
    )
    _, fast = build("qwen3")
    assert "differs from the eager one" in str(compile_passes(fast))
    assert fast.native is None


def test_a_drafted_block_is_the_same_to_the_bit_alone_and_beside_others() -> None:
    _, fast = build_drafter()
    assert compile_passes(build("qwen3")[1], fast) is None
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(n + 2, 32, generator=generator) for n in LENGTHS]
    uniforms = torch.zeros(3, fast.gamma, dtype=torch.float64)
    together = propose_together(fast, features, [11, 30, 2], Sampling(1.0), uniforms)
    for row in range(3):
        step = block_pass([11, 30, 2], list(LENGTHS), BLOCK_CONFIG, torch.float32)
        _, base = fast.read_block(alone(step, row))
        _, beside = fast.read_block(step)
        assert torch.equal(base[0], beside[row])
    assert together.probs_BGV.shape == (3, 4, 40)


@pytest.mark.parametrize(("dtype", "few"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_rounding_is_no_reason_to_refuse_a_pass_and_a_wrong_row_is(dtype: torch.dtype, few: float) -> None:
    rng = torch.Generator().manual_seed(0)
    eager = torch.randn(8, 512, generator=rng)
    _compare("target", dtype, eager, eager + 0.8 * few * torch.randn(8, 512, generator=rng))
    mixed = eager.clone()
    mixed[6] = eager[5]  # another token's logits
    for wrong in (mixed, eager.roll(1, 0), eager * (1 + 2 * few), torch.full_like(eager, torch.nan)):
        with pytest.raises(NoNative, match="the compiled target differs"):
            _compare("target", dtype, eager, wrong)

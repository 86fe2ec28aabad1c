"""The C++ pass of models in bfloat16: nearer to float32 than PyTorch's, and every token's own to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftkit.draft.checkpoint import new_drafter, open_drafter
from draftkit.draft.drafter import Drafter, DrafterConfig
from draftkit.draft.eagle3_shape import EagleConfig
from draftkit.engine.compiled import compile_passes
from draftkit.engine.engine import Engine
from draftkit.engine.native import HALVES, TILES, NativeStack
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.ops import native_build
from draftkit.ops.sampling import Sampling
from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget
from support.paged_drafter import LENGTHS, alone, block_pass, propose_together
from support.paged_drafter import build as build_drafter
from support.paged_target import FAMILIES, TABLES, TEXTS, build, one_pass

HALF = torch.bfloat16


@pytest.fixture(params=["native", "no tiles", "plain"])
def processor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """This machine's processor, one without AMX's tiles, and the plainest of its kind; the source is compiled
    for each."""
    flags = {"native": native_build._FLAGS, "no tiles": (*native_build._FLAGS, "-U__AMX_BF16__")}
    flags["plain"] = tuple(flag for flag in native_build._FLAGS if flag != "-march=native")
    if request.param != "native":
        monkeypatch.setattr(native_build, "_FLAGS", flags[request.param])
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / request.param))
    return str(request.param)


def native_logits(fast: PagedModel) -> Tensor:
    fast.native = NativeStack(fast.stack, fast.ends)
    step = one_pass([(text, 0, table) for text, table in zip(TEXTS, TABLES, strict=True)])
    return fast.read(step, None).logits_WV


def widened(fast: PagedModel, family: str) -> PagedModel:
    """The float32 model with the very weights of a bfloat16 one."""
    target, _ = build(family, HALF)
    return PagedModel(type(target)(target.model.float(), target.info), fast.stack.slots, 128)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_nearer_to_float32_than_pytorch_in_bfloat16(family: str, processor: str) -> None:
    _, half = build(family, HALF)
    step = one_pass([(text, 0, table) for text, table in zip(TEXTS, TABLES, strict=True)], dtype=HALF)
    rounded = half.read(step, None).logits_WV.float()
    exact = native_logits(widened(half, family))
    found = native_logits(half)
    assert found.dtype == torch.float32
    error, usual = (
        float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt()) for x in (found, rounded)
    )
    assert 0 < error < usual < 0.1, f"{error:.4f} against {usual:.4f}"


@pytest.mark.parametrize("tokens", [1, 6, 17, 70])
def test_products_are_those_of_float32(processor: str, tokens: int) -> None:
    _, half = build("qwen3", HALF)
    native = NativeStack(half.stack, half.ends)
    step = one_pass([(list(range(tokens)), 0, list(range(18)))], dtype=HALF)
    logits_WV, hidden_WH, _ = native.run(step, step.positions_T)
    kinds = {layer.qkv.kind for layer in native._layers} | {native._ends.head.kind}
    tiles = processor == "native" and native.library.can_multiply(TILES)
    assert kinds == {TILES if tiles else HALVES}
    torch.testing.assert_close(
        logits_WV.double(), hidden_WH.double() @ half.head.double().T, atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "gemma4"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_tokens_logits_are_the_same_to_the_bit_in_any_batch_and_any_cut(
    family: str, threads: int, processor: str
) -> None:
    _, half = build(family, HALF)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = native_logits(half)
        first = 0
        for text, table in zip(TEXTS, TABLES, strict=True):
            for size in (1, 3, 8, 11):
                cuts = range(0, len(text), size)
                pieces = [
                    half.read(one_pass([(text[i : i + size], i, table)], dtype=HALF), None).logits_WV
                    for i in cuts
                ]
                assert torch.equal(torch.cat(pieces), together[first : first + len(text)])
            first += len(text)
    finally:
        torch.set_num_threads(before)


def test_values_are_rounded_on_their_way_to_memory_as_pytorch_rounds(processor: str) -> None:
    """Those of the first layer depend on nothing that was rounded before but the input of one product."""
    _, half = build("llama", HALF)
    _, single = build("llama")
    for layer, exact in zip(half.stack.layers, single.stack.layers, strict=True):
        for name in ("input_norm", "qkv"):
            getattr(exact, name).copy_(getattr(layer, name))
    single.embedding.data.copy_(half.embedding)
    native_logits(half)
    native_logits(single)
    kept, wanted = (fast.stack.memory[0].chunk(2, -1)[1] for fast in (half, single))
    assert kept.dtype == HALF and wanted.count_nonzero()
    torch.testing.assert_close(kept.float(), wanted, atol=0.03, rtol=0.02)
    if processor == "plain":  # then the product is float32's, and the last rounding alone is left
        assert torch.equal(kept, wanted.to(HALF))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "none", "confidence": False},
        {"head": "gated"},
        {"markov_rank": 5},
        {
            "style": "gemma4",
            "rotary_share": 0.5,
            "soft_cap": 4.0,
            "shared_key_value": True,
            "logit_scale": 0.5,
        },
    ],
    ids=["markov", "none", "gated", "odd-rank", "gemma4"],
)
def test_drafters_come_close_and_draft_the_same_to_the_bit_beside_others(
    changes: dict[str, Any], processor: str
) -> None:
    _, fast = build_drafter(HALF, **changes)
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(n + 2, 32, generator=generator) for n in LENGTHS]
    assert compile_passes(build("qwen3", HALF)[1], fast) is None  # compares with the eager drafter
    assert fast.native is not None
    for temperature in (0.0, 0.8):
        uniforms_RG = torch.rand(3, fast.gamma, generator=generator, dtype=torch.float64)
        propose_together(fast, features, [11, 30, 2], Sampling(temperature), uniforms_RG)
    step = block_pass([11, 30, 2], list(LENGTHS), fast.config, HALF)
    tokens, _, confidence, _ = fast.draft(step, torch.tensor([11, 30, 2]), None)
    for row, anchor in enumerate((11, 30, 2)):
        found, _, said, _ = fast.draft(alone(step, row), torch.tensor([anchor]), None)
        assert torch.equal(found[0], tokens[row])
        if confidence is not None and said is not None:
            assert torch.equal(said[0], confidence[row])


def make_drafter(kind: str, target: TransformersTarget) -> Drafter:
    if kind == "packaged":
        return open_drafter(Path("draftkit/assets/tiny/drafter"), target, HALF)
    torch.manual_seed(2)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
    }
    places: dict[str, Any] = {"feature_layers": (3, 9), "num_target_layers": 14, "block_size": 4}
    shape = (
        EagleConfig(**sizes, **places)
        if kind == "eagle3"
        else DrafterConfig(
            **sizes, **places, num_layers=1, mask_token_id=3, markov_rank=8, head=kind, max_length=256
        )
    )
    return new_drafter(shape, target.embedding_weight().float(), target.head_weight().float()).to(HALF).eval()


def answers(engine: Engine, together: bool) -> list[list[int]]:
    """Of greedy and of seeded sampled requests."""
    assert engine.compiled
    made: dict[str, list[int]] = {}
    for i in range(6):
        params = SamplingParams(max_tokens=40, temperature=0.8 * (i % 2), seed=i, ignore_eos=True)
        engine.add_request(str(i), [7 * i + j for j in range(5 + 9 * i)], params)
        made[str(i)] = []
        while engine.has_work() and (i == 5 or not together):
            for output in engine.step():
                made[output.request_id] += [event.token_id for event in output.events]
    return list(made.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packaged", "gated", "eagle3"])
def test_the_engine_answers_alike_with_and_without_a_drafter_alone_and_together(kind: str) -> None:
    target = load_target("tiny", dtype="bfloat16")
    drafter = make_drafter(kind, target)
    without = answers(Engine(target, None, EngineSettings()), together=True)
    fixed, planned = (Engine(target, drafter, EngineSettings(plan=plan)) for plan in ("fixed", "planned"))
    alone = answers(fixed, together=False)
    assert fixed.metrics.verified > 0 and (fixed.metrics.accepted > 0 or kind != "packaged")
    assert alone[::2] == without[::2]
    assert answers(fixed, together=True) == alone == answers(planned, together=True)

"""Models grown for benchmarks are of the new size and still the old function: the same logits, answers and
proposals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.engine_load import read_prompts
from benchmarks.grown import Growth, grow_drafter, grow_target, head_sources
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint import new_drafter, open_drafter
from draftkit.draft.drafter import Proposal
from draftkit.engine.engine import Engine
from draftkit.engine.metrics import EngineMetrics
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.ops.sampling import Sampling
from draftkit.target.check import check_target
from draftkit.target.loading import load_target
from draftkit.target.place import EMBEDDED
from draftkit.target.transformers import TransformersTarget
from support.engine import finish, tokens_of

GROWTH = Growth(hidden=2, mlp=2, heads=16, kv_heads=4, layers=15, draft_layers=3, vocab=4196)
PROMPTS = read_prompts("tiny", 3)


@pytest.fixture(scope="module")
def tiny() -> TransformersTarget:
    return load_target("tiny")


@pytest.fixture(scope="module")
def grown(tiny: TransformersTarget) -> TransformersTarget:
    return grow_target(tiny, GROWTH, "cpu", torch.float32)


@pytest.fixture(scope="module")
def drafter(tiny: TransformersTarget) -> BlockDrafter:
    opened = open_drafter(EMBEDDED / "drafter", tiny)
    assert isinstance(opened, BlockDrafter)
    return opened


def answers(
    target: TransformersTarget, drafter: BlockDrafter | None
) -> tuple[dict[str, list[int]], EngineMetrics]:
    settings = EngineSettings(plan="fixed", max_running=4, max_length=512, kv_bytes=2**28, compile=False)
    engine = Engine(target, drafter, settings)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, SamplingParams(max_tokens=32, temperature=0, ignore_eos=True))
    return {name: tokens_of(outputs) for name, outputs in finish(engine).items()}, engine.metrics


def proposal(target: TransformersTarget, drafter: BlockDrafter, prompt: tuple[int, ...]) -> Proposal:
    features = target.forward(torch.tensor([prompt]), None, drafter.config.feature_layers).features_BTF
    assert features is not None
    context = drafter.new_context()
    drafter.extend(context, features[:, :-1], torch.tensor([prompt[1:]]))
    return drafter.propose(context, torch.tensor(prompt[-1:]), Sampling(0.0), torch.zeros(1, drafter.gamma))


@pytest.mark.slow
def test_the_grown_target_gives_the_same_logits_and_answers(
    tiny: TransformersTarget, grown: TransformersTarget
) -> None:
    check_target(grown)
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        small, large = (t.logits(t.forward(tokens, None).last_hidden_BTH) for t in (tiny, grown))
        torch.testing.assert_close(large[..., :4096], small, rtol=0, atol=1e-3)
        torch.testing.assert_close(large[..., 4096:], torch.zeros_like(large[..., 4096:]), rtol=0, atol=1e-3)
        assert small.amax(-1).min() > 1  # no further token is ever the best one
    assert answers(grown, None)[0] == answers(tiny, None)[0]


@pytest.mark.slow
def test_the_grown_drafter_makes_the_same_proposals(
    tiny: TransformersTarget, grown: TransformersTarget, drafter: BlockDrafter
) -> None:
    large, metrics = answers(grown, grow_drafter(drafter, grown, GROWTH))
    small, wanted = answers(tiny, drafter)
    assert large == small
    assert metrics.accepted_per_position == wanted.accepted_per_position and metrics.rounds == wanted.rounds
    assert wanted.accepted > 10


@pytest.mark.parametrize("head", ["none", "markov", "gated", "rnn"])
@pytest.mark.parametrize("style", ["qwen3", "llama"])
def test_every_head_kind_grows(
    head: str, style: str, tiny: TransformersTarget, grown: TransformersTarget, drafter: BlockDrafter
) -> None:
    torch.manual_seed(1)
    config = replace(drafter.config, head=head, style=style, num_layers=2, window=8, layout="one_plus_n")
    fresh = new_drafter(config, tiny.embedding_weight(), tiny.head_weight()).eval()
    assert isinstance(fresh, BlockDrafter)
    for name, parameter in fresh.named_parameters():
        if "head." in name and name != "lm_head.weight":
            torch.nn.init.normal_(parameter, std=0.2)  # several of them start at zero
    small, large = (
        proposal(t, d, PROMPTS[0]) for t, d in ((tiny, fresh), (grown, grow_drafter(fresh, grown, GROWTH)))
    )
    assert torch.equal(large.tokens_BG, small.tokens_BG)
    assert small.confidence_BG is not None and large.confidence_BG is not None
    torch.testing.assert_close(large.confidence_BG, small.confidence_BG, rtol=0, atol=1e-4)


def test_the_models_are_of_the_new_size(grown: TransformersTarget, drafter: BlockDrafter) -> None:
    hidden, width, mlp, heads, kv_heads = 512, 64, 640, 16, 4
    layer = hidden * width * 2 * (heads + kv_heads) + 3 * hidden * mlp + 2 * hidden + 2 * width
    assert sum(p.numel() for p in grown.model.parameters()) == 15 * layer + 2 * 4196 * hidden + hidden
    assert (grown.info.hidden_size, grown.info.num_layers, grown.info.vocab_size) == (hidden, 15, 4196)
    layers = grow_drafter(drafter, grown, GROWTH).layers
    assert len(layers) == 3 and layers[2].self_attn.q_proj.weight.shape == (heads * width, hidden)
    for last in (grown.layers[-1], layers[-1]):  # it is computed in full, and silent
        assert last.self_attn.q_proj.weight.std() > 0.01 and last.mlp.gate_proj.weight.std() > 0.01
        assert not last.self_attn.o_proj.weight.any() and not last.mlp.down_proj.weight.any()


def test_made_in_half_precision_it_keeps_rotary_frequencies_and_generators(tiny: TransformersTarget) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    half = grow_target(tiny, GROWTH, "cpu", torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    frequencies = half.model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and torch.equal(
        frequencies, tiny.model.model.rotary_emb.inv_freq
    )
    head = half.head_weight()
    assert not head[4096:].unflatten(1, (2, -1)).sum(1).any()  # the copies cancel out, exactly


def test_query_heads_stay_with_their_key_heads() -> None:
    assert head_sources((4, 2), (8, 2)) == ([0, 1, 0, 1, 2, 3, 2, 3], [0, 1])
    assert head_sources((4, 2), (8, 8)) == ([0, 2, 1, 3, 0, 2, 1, 3], [0, 1] * 4)
    queries, keys = head_sources((4, 2), (64, 16))
    assert all(queries[head] // 2 == keys[head // 4] for head in range(64))
    assert [queries.count(head) for head in range(4)] == [16] * 4


@pytest.mark.parametrize(
    "wrong", [{"hidden": 3}, {"heads": 12}, {"kv_heads": 3}, {"layers": 13}, {"vocab": 4095}]
)
def test_a_growth_that_cannot_be_exact_ends_with_one_line(
    wrong: dict[str, int], tiny: TransformersTarget
) -> None:
    with pytest.raises(SystemExit, match=r"\w"):
        grow_target(tiny, replace(GROWTH, **wrong), "cpu", torch.float32)


def test_a_drafter_of_another_target_ends_with_one_line(
    grown: TransformersTarget, drafter: BlockDrafter
) -> None:
    other = new_drafter(drafter.config, drafter.embed_tokens.weight + 1, drafter.lm_head.weight)
    assert isinstance(other, BlockDrafter)
    with pytest.raises(SystemExit, match="embedding is not that of tiny grown"):
        grow_drafter(other, grown, GROWTH)

"""How many tokens the memory for keys and values holds: a large target needs no settings, and what is counted
is taken."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, Qwen3Config, Qwen3ForCausalLM

from draftkit.decode import decode
from draftkit.engine import measure, memory
from draftkit.engine.engine import Engine
from draftkit.engine.memory import Room, bytes_per_position, room_for
from draftkit.engine.paged_drafter import PagedBlockDrafter
from draftkit.engine.paged_eagle import PagedEagle
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.passes import Pass
from draftkit.engine.sampling_params import SamplingParams
from draftkit.engine.settings import EngineSettings
from draftkit.errors import ServeError
from draftkit.ops.sampling import Sampling
from draftkit.target.interface import TargetInfo
from draftkit.target.loading import load_target
from draftkit.target.place import EMBEDDED
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter, make_eagle
from support.engine import PROMPTS, finish, small, tokens_of
from support.paged_target import build

GIB = 2**30


@pytest.fixture(scope="module")
def large() -> TransformersTarget:
    """A target of the shape of Qwen3-8B in bfloat16, without its numbers."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    }
    config = Qwen3Config(
        **sizes, num_key_value_heads=8, head_dim=128, vocab_size=151_936, max_position_embeddings=40_960
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    return TransformersTarget(
        model, TargetInfo("large", None, "none", 151_936, 4096, 36, (1,), 40_960, "qwen3")
    )


def give(monkeypatch: pytest.MonkeyPatch, available: float) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(available))


def test_the_longest_request_of_a_large_target_fits_without_a_word(
    large: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, 12 * GIB)
    room = room_for(large, None, EngineSettings())
    assert bytes_per_position(large, None) == 147_456
    assert room.max_length == 40_960 and room.blocks * 16 >= 40_961
    assert room.blocks * 16 * 147_456 < 6 * GIB, "a CPU's memory is not for us alone"


def test_requests_are_as_long_as_the_memory_is(
    large: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, 2 * GIB)
    room = room_for(large, None, EngineSettings())
    assert room == Room(910, 910 * 16 - 1)
    with pytest.raises(
        ServeError, match=r"the free memory of 2 GiB hold 14560 tokens .* 40000; give a smaller max_length"
    ):
        room_for(large, None, EngineSettings(max_length=40_000))
    with pytest.raises(
        ServeError, match=r"kv_bytes of 1 GiB hold 7280 .* 40960; give 5.6\d* GiB or a smaller max_length"
    ):
        room_for(large, None, EngineSettings(kv_bytes=GIB))
    give(monkeypatch, 16 * 147_456)
    with pytest.raises(ServeError, match="hold 0 tokens"):
        room_for(large, None, EngineSettings(block_size=32))


def test_a_short_memory_is_said_and_answers_stay_right(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = make_drafter(target)
    give(monkeypatch, 15 * 4 * bytes_per_position(target, drafter))
    engine = Engine(target, drafter, small(kv_bytes=None))
    assert (engine.info.max_length, engine.info.kv_blocks_total) == (15 * 4 - drafter.gamma - 1, 15)
    engine.add_request("a", PROMPTS[0], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    plain = target.model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=40, do_sample=False, eos_token_id=-1
    )
    assert tokens_of(finish(engine)["a"]) == plain[0, len(PROMPTS[0]) :].tolist()


@pytest.mark.parametrize("kind", ["gemma4", "none", "block", "eagle3"])
def test_what_is_counted_is_what_is_taken(target: TransformersTarget, kind: str) -> None:
    """Gemma's global layers have heads of another size; EAGLE-3 keeps a state beside its keys and values."""
    counted = build(kind, torch.float64)[0] if kind == "gemma4" else target
    drafters = {"block": make_drafter, "eagle3": lambda target: make_eagle(target, tuple(range(50)))}
    drafter = drafters[kind](target) if kind in drafters else None
    models = Engine(counted, drafter, small(max_length=32))._models
    assert isinstance(models.model, PagedModel)
    memories = [*models.model.stack.memory]
    if models.drafter is not None:
        memories += models.drafter.stack.memory
    if isinstance(models.drafter, PagedEagle):
        memories.append(models.drafter._states)
    assert bytes_per_position(counted, drafter) == sum(one[:1].nbytes for one in memories)


def test_gemma_4_answers_also_where_the_lean_forward_cannot_run_it() -> None:
    """Its configuration gives no heads or head size of the model as a whole, only of each layer."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    places = {
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size": 64,
        "num_key_value_heads": 2,
    }
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "global_head_dim": 16}
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(
        Gemma4TextConfig(**sizes, **places, **per_layer, max_position_embeddings=64)
    ).double()
    gemma = TransformersTarget(model, TargetInfo("gemma", None, "none", 64, 32, 2, (), 64, "gemma4_text"))
    engine = Engine(gemma, None, small())
    assert engine.info.forward.startswith("Transformers")
    engine.add_request("a", [3, 4, 5], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    plain = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert tokens_of(finish(engine)["a"]) == plain[0, 3:].tolist()


@pytest.mark.parametrize("max_length", [2, 3, 40])
def test_short_requests_are_measured_inside_their_memory(
    target: TransformersTarget, max_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C++ pass would write wherever it is told to."""
    passes: list[Pass] = []

    def noted(*arguments: object) -> Pass:
        passes.append(Pass(*arguments))  # type: ignore[arg-type]
        return passes[-1]

    monkeypatch.setattr(measure, "Pass", noted)
    engine = Engine(target, make_drafter(target), small(plan="planned", max_length=max_length))
    assert engine._planner.step_rate is not None
    assert {bool((p.starts_R >= 0).all()) for p in passes} == {True}
    ends = max(int((p.starts_R + p.lengths_R).max()) for p in passes)
    assert max_length < ends <= max_length + engine.info.gamma + 1
    assert all(p.tables_RB.size for p in passes)


def test_each_weight_lies_in_memory_once_when_compiled_passes_are_in_use() -> None:
    target, prompt = load_target("tiny"), [5, 8, 13, 21, 34]
    wanted = decode(target, None, prompt, Sampling(0.0), 24, 0).tokens
    engine = Engine(target, EMBEDDED / "drafter", EngineSettings(plan="fixed"))
    assert engine.compiled
    model, drafter = engine._models.model, engine._models.drafter
    assert isinstance(model, PagedModel) and isinstance(drafter, PagedBlockDrafter)
    assert model.native is not None and drafter.native is not None
    left = [model.head, drafter.head.weight_VH, drafter.fc, drafter.context_kv]
    assert model.stack.layers == drafter.stack.layers == () and all(t.numel() == 0 for t in left)
    assert drafter.native.stack._ends.head.panels == model.native._ends.head.panels
    assert drafter.embedding.data_ptr() == model.embedding.data_ptr() == target.embedding_weight().data_ptr()
    engine.add_request("a", prompt, SamplingParams(max_tokens=24, temperature=0.0))
    assert tokens_of(finish(engine)["a"]) == list(wanted)

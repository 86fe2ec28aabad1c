"""The engine agrees with the reference loop: any batch, any cutting of prompts, with and without a
drafter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from draftkit.decode import decode
from draftkit.draft.checkpoint import new_drafter
from draftkit.draft.eagle3_shape import EagleConfig
from draftkit.engine.engine import Engine
from draftkit.engine.kv_cache import BlockTable
from draftkit.engine.paged_drafter import PagedBlockDrafter
from draftkit.engine.paged_model import PagedModel
from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import DataError
from draftkit.ops.sampling import Sampling
from draftkit.schedule.gate import EVIDENCE, SHORTEST, Gate
from draftkit.schedule.step_rate import StepRate
from draftkit.target.loading import load_target
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter
from support.engine import PROMPTS, finish, small, tokens_of
from support.targets import TEXTS
from tools.tiny_target.tokenizer import train_tokenizer


@pytest.mark.parametrize("head", [None, "none", "markov", "gated", "rnn"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_are_those_of_the_reference_loop(
    target: TransformersTarget, head: str | None, temperature: float
) -> None:
    drafter = make_drafter(target, head) if head else None
    engine = Engine(target, drafter, small())
    for seed, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=30, temperature=temperature, seed=seed, top_k=20, top_p=0.95)
        engine.add_request(str(seed), prompt, params)
    outputs = finish(engine)
    sampling = Sampling(temperature, top_k=20, top_p=0.95)
    for seed, prompt in enumerate(PROMPTS):
        wanted = decode(target, drafter, prompt, sampling, 30, seed)
        assert tokens_of(outputs[str(seed)]) == list(wanted.tokens)
        assert outputs[str(seed)][-1].finish_reason == wanted.finish_reason
    assert engine.metrics.kv_used == 0 and engine.metrics.running == engine.metrics.waiting == 0


def test_a_target_that_the_lean_forward_cannot_run_gives_the_same_answers(tmp_path: Path) -> None:
    """GPT-2's layers are in no table: the Transformers module runs, with a drafter beside it."""
    tokenizer = train_tokenizer(TEXTS)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    other = load_target(str(tmp_path), dtype="float64")
    for drafter in (None, make_drafter(other)):
        engine = Engine(other, drafter, small(plan="planned"))
        assert engine.info.forward.startswith("Transformers (family gpt2")
        for seed, prompt in enumerate(PROMPTS):
            engine.add_request(
                str(seed), prompt, SamplingParams(max_tokens=20, temperature=seed % 2, seed=seed)
            )
        outputs = finish(engine)
        for seed, prompt in enumerate(PROMPTS):
            wanted = decode(other, drafter, prompt, Sampling(seed % 2), 20, seed)
            assert tokens_of(outputs[str(seed)]) == list(wanted.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_eagle_proposes_in_the_engine_what_it_proposes_alone(
    target: TransformersTarget, temperature: float
) -> None:
    torch.manual_seed(2)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_length": 256,
    }
    shape = EagleConfig(
        **sizes,
        vocab_size=target.info.vocab_size,
        feature_layers=(0, 2),
        num_target_layers=4,
        block_size=4,
        style="llama",
    )
    drafter = new_drafter(shape, target.embedding_weight(), target.head_weight()).double().eval()
    engine = Engine(target, drafter, small(plan="planned", kv_bytes=2**18, max_length=120))
    measured = engine._planner.step_rate
    assert measured is not None and measured.drafter_seconds(4) >= measured.drafter_seconds(1) > 0
    for seed, prompt in enumerate(PROMPTS):
        engine.add_request(
            str(seed), prompt, SamplingParams(max_tokens=30, temperature=temperature, seed=seed)
        )
    outputs = finish(engine)
    for seed, prompt in enumerate(PROMPTS):
        wanted = decode(target, drafter, prompt, Sampling(temperature), 30, seed)
        assert tokens_of(outputs[str(seed)]) == list(wanted.tokens)
    assert engine.metrics.kv_used == 0 and (engine.metrics.accepted > 0 or temperature == 0)


def test_a_request_without_drafts_is_plain_decoding(target: TransformersTarget) -> None:
    engine = Engine(target, make_drafter(target), small())
    for seed, prompt in enumerate(PROMPTS):
        engine.add_request(str(seed), prompt, SamplingParams(max_tokens=12, seed=seed, draft=seed % 2 == 0))
    outputs = finish(engine)
    for seed in (1, 3, 5):
        wanted = decode(target, None, PROMPTS[seed], Sampling(1.0), 12, seed)
        assert tokens_of(outputs[str(seed)]) == list(wanted.tokens)
        assert outputs[str(seed)][-1].stats.drafted == 0
    assert outputs["2"][-1].stats.drafted > 0


def test_when_memory_runs_out_requests_are_read_again_with_the_same_answers(
    target: TransformersTarget,
) -> None:
    """Six requests that need up to 84 positions each, in a memory of 160."""
    drafter = make_drafter(target)
    one_block = 2 * (4 + 2) * 2 * 8 * 8 * 4
    engine = Engine(target, drafter, small(kv_bytes=40 * one_block, max_length=100))
    assert engine.info.kv_blocks_total == 40
    for seed, prompt in enumerate(PROMPTS):
        engine.add_request(str(seed), prompt, SamplingParams(max_tokens=40, seed=seed, ignore_eos=True))
    outputs = finish(engine)
    assert engine.metrics.preemptions > 0
    roomy = Engine(target, drafter, small())
    for seed, prompt in enumerate(PROMPTS):
        roomy.add_request(str(seed), prompt, SamplingParams(max_tokens=40, seed=seed, ignore_eos=True))
    wanted = finish(roomy)
    assert {k: tokens_of(v) for k, v in outputs.items()} == {k: tokens_of(v) for k, v in wanted.items()}
    assert engine.metrics.kv_used == 0


def test_a_known_prefix_is_not_read_again_and_drafts_are_as_good(target: TransformersTarget) -> None:
    drafter = make_drafter(target)
    engine = Engine(target, drafter, small())
    prompt = PROMPTS[2]
    results = []
    for name in ("cold", "warm"):
        engine.add_request(name, prompt, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
        results.append(finish(engine)[name])
    cold, warm = results
    assert tokens_of(cold) == tokens_of(warm)
    assert (cold[-1].stats.cached_tokens, warm[-1].stats.cached_tokens) == (0, 48)
    assert cold[-1].stats.accepted == warm[-1].stats.accepted > 0


def test_aborts_free_everything_at_any_step(target: TransformersTarget) -> None:
    engine = Engine(target, make_drafter(target), small(max_running=3))
    for step in range(30):
        engine.add_request(str(step), PROMPTS[step % 6], SamplingParams(max_tokens=20, seed=step))
        if step % 2:
            engine.abort(str(step - step % 5))
        engine.step()
    for step in range(30):
        engine.abort(str(step))
    engine.abort("never there")
    assert not engine.has_work() and engine.step() == []
    assert (engine.metrics.kv_used, engine.metrics.running, engine.metrics.waiting) == (0, 0, 0)


@pytest.mark.parametrize(
    ("tokens", "params", "message"),
    [
        ([], SamplingParams(), "prompt of 0"),
        ([1] * 256, SamplingParams(), "prompt of 256"),
        ([1] * 250, SamplingParams(max_tokens=7), "context is 256"),
        ([10**6], SamplingParams(), "out of vocabulary"),
        ([1], SamplingParams(logit_bias={-1: 1.0}), "out of vocabulary"),
        ([1], SamplingParams(allowed_token_ids=()), "empty"),
        ([1], SamplingParams(seed=7), "there already"),
    ],
)
def test_impossible_requests_are_refused(
    target: TransformersTarget, tokens: list[int], params: SamplingParams, message: str
) -> None:
    engine = Engine(target, None, small())
    engine.add_request("taken", [1], SamplingParams())
    with pytest.raises(DataError, match=message):
        engine.add_request("taken" if "already" in message else "new", tokens, params)


def test_an_answer_may_fill_the_context_to_its_last_token(target: TransformersTarget) -> None:
    engine = Engine(target, make_drafter(target), small())
    engine.add_request("a", PROMPTS[0], SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
    outputs = finish(engine)["a"]
    assert len(tokens_of(outputs)) == 252 and outputs[-1].finish_reason == "length"
    plain = target.model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=252, do_sample=False, eos_token_id=-1
    )
    assert tokens_of(outputs) == plain[0, 4:].tolist()


FLAT = StepRate((1, 2, 1000), (0.01, 0.01, 0.0100001))  # tokens cost nothing: everything is verified
# a token more costs more than a whole pass of one: nothing is
STEEP = StepRate((1, 2, 1000), (0.01, 0.04, 30.0))


@pytest.mark.parametrize("head", ["markov", "none"])
@pytest.mark.parametrize(("rate", "verified"), [(FLAT, "most"), (STEEP, "none"), (None, "some")])
def test_planned_lengths_change_the_work_and_not_the_answer(
    target: TransformersTarget,
    head: str,
    rate: StepRate | None,
    verified: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Gate, "drafts", lambda self, requests: True)
    drafter = make_drafter(target, head)
    engine = Engine(target, drafter, small(plan="planned", step_rate=rate))
    for seed, prompt in enumerate(PROMPTS):
        engine.add_request(
            str(seed), prompt, SamplingParams(max_tokens=30, temperature=seed % 2, seed=seed, ignore_eos=True)
        )
    outputs = finish(engine)
    whole = Engine(target, drafter, small())
    for seed, prompt in enumerate(PROMPTS):
        whole.add_request(
            str(seed), prompt, SamplingParams(max_tokens=30, temperature=seed % 2, seed=seed, ignore_eos=True)
        )
    assert {k: tokens_of(v) for k, v in outputs.items()} == {
        k: tokens_of(v) for k, v in finish(whole).items()
    }
    greedy = [outputs[k][-1].stats for k in "024"]
    share = sum(s.verified for s in greedy) / max(sum(s.drafted for s in greedy), 1)
    if verified == "none":
        assert share < 0.1
    elif verified == "most":
        assert share > 0.9
    # seeded samples keep all
    assert all(s.verified == s.drafted for s in (outputs[k][-1].stats for k in "135"))


def test_a_drafter_that_is_slower_than_it_was_said_to_be_is_left_alone(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with drafts takes fifty times as long as one without."""
    engine = Engine(target, make_drafter(target), small(plan="planned", step_rate=FLAT))
    record = engine._planner.record

    def slow(requests: object, drafting: Sequence[object], tokens: int, seconds: float) -> None:
        record(requests, drafting, tokens, 50.0 if drafting else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._planner, "record", slow)
    engine.add_request("a", PROMPTS[0], SamplingParams(max_tokens=120, temperature=0, ignore_eos=True))
    outputs = finish(engine)
    plain = target.model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=120, do_sample=False, eos_token_id=-1
    )
    assert tokens_of(outputs["a"]) == plain[0, 4:].tolist()
    drafted = engine.metrics.drafted / engine.info.gamma
    assert 0 < drafted <= SHORTEST + EVIDENCE and engine.metrics.rounds > 70


@pytest.mark.parametrize("plan", ["planned", "fixed"])
def test_passes_are_compiled_and_measured_before_the_first_request_and_stay(
    target_folder: Path, plan: str
) -> None:
    """float32, where the compiled pass runs: the answers of the Transformers module, up to ties in the
    arithmetic."""
    settings = small(plan=plan, dtype="float32", step_tokens=64, compile=True)
    drafter = make_drafter(load_target(str(target_folder), dtype="float64")).float()
    engine = Engine(str(target_folder), drafter, settings)
    assert (engine._planner.step_rate is None) == (plan == "fixed"), (
        "lengths that are fixed need no step rate"
    )
    model, paged = engine._models.model, engine._models.drafter
    assert isinstance(model, PagedModel) and isinstance(paged, PagedBlockDrafter)
    passes, rate = (model.native, paged.native), engine._planner.step_rate
    assert engine.compiled and None not in passes
    engine.add_request("a", PROMPTS[0], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    found = tokens_of(finish(engine)["a"])
    own = load_target(str(target_folder)).model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=40, do_sample=False, eos_token_id=-1
    )
    assert found == own[0, 4:].tolist()
    assert (model.native, paged.native) == passes and engine._planner.step_rate is rate


def test_without_a_compiler_the_engine_says_so_and_serves(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(target, make_drafter(target), small(compile=True))  # float64, which has no compiled pass
    assert not engine.compiled and "no compiled passes: PyTorch operations do the same slower" in caplog.text
    engine.add_request("a", PROMPTS[0], SamplingParams(max_tokens=8, temperature=0))
    assert len(tokens_of(finish(engine)["a"])) == 8


@pytest.mark.parametrize("head", ["markov", "none"])
def test_the_drafter_reads_what_the_target_reads_whether_it_drafts_or_not(
    target: TransformersTarget, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proposals after steps without drafting, and after a prefix that others made without it, are those of an
    engine that drafts in every step."""
    found = []
    for pattern in ([True], [False] * 5 + [True]):
        engine = Engine(target, make_drafter(target, head), small(max_running=3))
        choose, turn = engine._planner.drafting, itertools.cycle(pattern)
        monkeypatch.setattr(engine._planner, "drafting", lambda d, c=choose, t=turn: c(d) if next(t) else [])
        params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
        engine.add_request("first", PROMPTS[0], params)
        first = tokens_of(finish(engine)["first"])
        monkeypatch.setattr(engine._planner, "drafting", choose)
        engine.add_request("next", [*PROMPTS[0], *first, 7], params)
        outputs = finish(engine)["next"]
        assert outputs[0].stats.cached_tokens > len(first)
        found.append([(o.events, o.rejected) for o in outputs])
    assert found[0] == found[1] and any(rejected for _, rejected in found[0])


@pytest.mark.parametrize("drafting", [True, False])
def test_prompts_get_the_tokens_of_a_step_that_answers_leave(
    target: TransformersTarget, drafting: bool
) -> None:
    """Five requests decode, whose drafted tokens come on top: eight tokens are left of each step."""
    engine = Engine(
        target, make_drafter(target) if drafting else None, small(plan="fixed", step_tokens=13, max_running=6)
    )
    for number in range(5):
        params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
        engine.add_request(str(number), [9 + number], params)
    for _ in range(5):
        engine.step()
    engine.add_request("long", list(range(40, 68)), SamplingParams(max_tokens=4, temperature=0))
    taken = next(n for n in range(1, 20) if any(output.request_id == "long" for output in engine.step()))
    assert taken == -(-28 // 8)


def test_a_request_that_cannot_be_added_is_not_there(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(target, None, small())

    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("draftkit.engine.engine.Adjustment", broken)
    with pytest.raises(MemoryError):
        engine.add_request("a", [1, 2], SamplingParams(presence_penalty=1.0))
    assert not engine.has_work()
    engine.abort("a")
    monkeypatch.undo()
    engine.add_request("a", [1, 2], SamplingParams(presence_penalty=1.0, max_tokens=2))
    assert len(tokens_of(finish(engine)["a"])) == 2


def test_blocks_that_a_preempted_request_finds_again_are_not_counted_as_cached(
    target: TransformersTarget,
) -> None:
    engine = Engine(target, None, small(max_length=100, max_running=2))
    spare = engine._models.pool.num_blocks - 30
    held = BlockTable()
    assert engine._models.pool.grow(held, spare * 4)
    for i in range(2):
        params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        engine.add_request(str(i), list(range(50 * i, 50 * i + 41)), params)
    outputs = finish(engine)
    assert engine.metrics.preemptions > 0
    assert {o.stats.cached_tokens for answer in outputs.values() for o in answer} == {0}
    assert (engine.metrics.prefix_hits, engine.metrics.prefix_queries) == (0, 82)


def test_a_drafter_whose_confidences_are_no_numbers_breaks_no_step(target: TransformersTarget) -> None:
    for plan in ("fixed", "planned"):
        drafter = make_drafter(target)
        assert drafter.confidence_head is not None
        drafter.confidence_head.proj.bias.data.fill_(float("nan"))
        engine = Engine(target, drafter, small(plan=plan))
        for i, params in enumerate(
            [SamplingParams(max_tokens=20, temperature=0), SamplingParams(max_tokens=20, seed=3)]
        ):
            engine.add_request(str(i), PROMPTS[i], params)
        outputs = finish(engine)
        wanted = decode(target, None, PROMPTS[0], Sampling(), 20).tokens
        assert tokens_of(outputs["0"]) == list(wanted)

"""Log probabilities of prompts: the target's own, however the prompt is cut, beside whom, and read before or
not."""

from __future__ import annotations

import pytest
import torch

from draftkit.engine import scheduler
from draftkit.engine.engine import Engine
from draftkit.engine.kv_cache import BlockTable
from draftkit.engine.outputs import PromptToken
from draftkit.engine.sampling_params import SamplingParams
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter
from support.engine import PROMPTS, finish, small, tokens_of

LONG = [(7 * i + i * i) % 90 + 10 for i in range(70)]
ASKED = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, prompt_logprobs=2)


def check(
    target: TransformersTarget, prompt: list[int], told: tuple[PromptToken, ...] | None, top: int = 2
) -> None:
    """What was told is what the target says of the whole prompt at once."""
    assert told is not None and [t.token_id for t in told] == prompt[1:]
    logits_TV = target.logits(target.forward(torch.tensor([prompt]), None).last_hidden_BTH[0])
    wanted_TV = torch.log_softmax(logits_TV.float(), -1)[:-1]
    for place, token in enumerate(told):
        assert token.logprob == pytest.approx(float(wanted_TV[place, token.token_id]), abs=1e-4)
        assert token.rank == pytest.approx(
            int((wanted_TV[place] > wanted_TV[place, token.token_id]).sum()) + 1, abs=1
        )
        assert [p for _, p in token.top_logprobs] == pytest.approx(
            wanted_TV[place].topk(top).values.tolist(), abs=1e-4
        )
        for token_id, logprob in token.top_logprobs:
            assert logprob == pytest.approx(float(wanted_TV[place, token_id]), abs=1e-4)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("step_tokens", "scored"), [(512, 256), (16, 256), (512, 5)])
def test_prompts_are_scored_beside_others_and_in_any_chunks(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch, step_tokens: int, scored: int, compile: bool
) -> None:
    monkeypatch.setattr(scheduler, "SCORED", scored)
    engine = Engine(target, make_drafter(target), small(step_tokens=step_tokens, compile=compile))
    plain = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    engine.add_request("plain", PROMPTS[0], plain)
    engine.step()
    engine.add_request("long", LONG, ASKED)
    engine.add_request("short", PROMPTS[1], ASKED)
    engine.add_request("beside", PROMPTS[2], plain)
    engine.add_request("single", [5], ASKED)
    outputs = finish(engine)
    check(target, LONG, outputs["long"][0].prompt)
    check(target, PROMPTS[1], outputs["short"][0].prompt)
    assert outputs["single"][0].prompt == ()
    assert all(
        o.prompt is None for name in outputs for o in outputs[name][name in ("long", "short", "single") :]
    )
    alone = Engine(target, make_drafter(target), small(compile=compile))
    for name, prompt in (("plain", PROMPTS[0]), ("beside", PROMPTS[2]), ("long", LONG)):
        alone.add_request(name, prompt, plain)
        told = tokens_of(outputs[name])
        assert tokens_of(finish(alone)[name])[name == "plain" :][: len(told)] == told


def test_a_prompt_that_is_known_is_scored_and_helps_the_next(target: TransformersTarget) -> None:
    engine = Engine(target, make_drafter(target), small())
    for name in "ab":
        engine.add_request(name, LONG, ASKED)
        [first, *_] = finish(engine)[name]
        check(target, LONG, first.prompt)
        assert first.stats.cached_tokens == 0
    engine.add_request("c", LONG, SamplingParams(max_tokens=2, temperature=0))
    assert finish(engine)["c"][0].stats.cached_tokens == 68


def test_who_loses_its_memory_while_it_is_scored_is_scored_all_the_same(target: TransformersTarget) -> None:
    engine = Engine(target, None, small(step_tokens=8, max_length=100, max_running=2))
    spare = engine._models.pool.num_blocks - 25
    assert engine._models.pool.grow(BlockTable(), spare * 4)
    engine.add_request("old", list(range(60)), SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    while not any(o.events for o in engine.step()):
        pass
    engine.add_request("new", LONG[:30], ASKED)
    seen, outputs = set(), []
    while engine.has_work():
        outputs += [o for o in engine.step() if o.request_id == "new"]
        seen |= {(r.row < 0, len(r.scores)) for r in engine._requests.values() if r.id == "new"}
    assert any(waits and scores > 0 for waits, scores in seen), (
        "it was never preempted in the middle of its prompt"
    )
    check(target, LONG[:30], outputs[0].prompt)

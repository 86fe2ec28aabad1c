"""Evaluation counts the same rounds whether the engine or the reference loop made the answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_decode import make_drafter

from draftkit.evaluate.run import EvalPrompt, EvalSettings, evaluate
from draftkit.ops.sampling import Sampling
from draftkit.target.transformers import TransformersTarget

PROMPTS = [EvalPrompt(str(i), ["code", "chat"][i % 2], (4 + i % 20, 20, 31 + i)) for i in range(10)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_by_the_engine_are_those_of_the_reference_loop(target: TransformersTarget, temperature: float) -> None:
    settings = EvalSettings(Sampling(temperature), max_new_tokens=24, batch_size=4, speed_prompts=0)
    drafter, ticks = make_drafter(target), []
    by_engine = evaluate(target, drafter, PROMPTS, settings, lambda: ticks.append(1))
    by_loop = evaluate(target, drafter, PROMPTS, replace(settings, batch_size=1))
    assert len(ticks) == len(PROMPTS) and by_engine.speed == {}
    for one, other in zip(by_engine.records, by_loop.records, strict=True):
        assert (one.prompt_id, one.new_tokens, one.finish_reason) == (other.prompt_id, other.new_tokens, other.finish_reason)
        # of a round that the limit cut, the engine verifies only what there is room for: only there may they differ
        assert abs(one.rounds - other.rounds) <= 1
        shared = min(one.rounds, other.rounds)
        assert one.accepted_per_round[:shared] == other.accepted_per_round[:shared]
    assert sum(r.rounds for r in by_engine.records) > 50


def test_speed_is_by_domain_and_its_mean(target: TransformersTarget) -> None:
    settings = EvalSettings(Sampling(0.0), max_new_tokens=6, batch_size=4, speed_prompts=4)
    speed = evaluate(target, make_drafter(target), PROMPTS[:4], settings).speed
    assert list(speed) == ["code", "chat", "macro"]
    assert [s.prompts for s in speed.values()] == [2, 2, 4]
    assert speed["macro"].ratio == pytest.approx((speed["code"].ratio + speed["chat"].ratio) / 2)
    assert all(s.low_quartile <= s.ratio <= s.high_quartile for s in speed.values())

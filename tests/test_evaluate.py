"""Evaluation counts the same rounds whether the engine or the reference loop made the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftkit import evaluate_stages, stages
from draftkit.config import Recipe, load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.draft.checkpoint import save_drafter
from draftkit.engine.engine import Engine
from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import Interrupted
from draftkit.evaluate import speed as speed_module
from draftkit.evaluate.run import EvalPrompt, EvalResult, evaluate
from draftkit.evaluate.speed import _speed
from draftkit.ops.sampling import Sampling
from draftkit.settings import EvaluateSettings
from draftkit.target.transformers import TransformersTarget
from support.bar import Counted
from support.drafters import make_drafter

PROMPTS = [EvalPrompt(str(i), ["code", "chat"][i % 2], (4 + i % 20, 20, 31 + i)) for i in range(10)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_by_the_engine_are_those_of_the_reference_loop(
    target: TransformersTarget, temperature: float
) -> None:
    settings = EvaluateSettings(max_new_tokens=24, batch_size=4, speed_prompts=0)
    drafter, bar = make_drafter(target), Counted()
    by_engine = evaluate(target, drafter, PROMPTS, settings, Sampling(temperature), bar)
    by_loop = evaluate(target, drafter, PROMPTS, replace(settings, batch_size=1), Sampling(temperature))
    assert bar.done == len(PROMPTS) and by_engine.speed == {}
    for one, other in zip(by_engine.records, by_loop.records, strict=True):
        assert (one.prompt_id, one.new_tokens, one.finish_reason) == (
            other.prompt_id,
            other.new_tokens,
            other.finish_reason,
        )
        # of a round that the limit cut, the engine verifies only what there is room for: only there may they
        # differ
        assert abs(one.rounds - other.rounds) <= 1
        shared = min(one.rounds, other.rounds)
        assert one.accepted_per_round[:shared] == other.accepted_per_round[:shared]
    assert sum(r.rounds for r in by_engine.records) > 50


def test_a_finished_temperature_is_kept_and_anything_else_measured_again(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["evaluate.max_new_tokens=4", "evaluate.speed_prompts=0", "evaluate.temperatures=[0.0, 1.0]"]
    recipe = load_recipe("tiny-dspark", [f"target.path={target_folder}", *sizes])
    target, tokenizer = stages.open_target(recipe)
    save_drafter(make_drafter(target), tmp_path / "drafter", {}, torch.float32)
    asked = [Conversation(str(i), "chat", (Message("user", f"What is a list? {i}"),)) for i in range(2)]
    measured: list[float] = []

    def stopped_at(
        temperature: float | None, recipe: Recipe, prompts: list[Conversation]
    ) -> list[EvalResult]:
        def once(*arguments: Any, **named: Any) -> EvalResult:
            measured.append(arguments[4].temperature)
            if measured[-1] == temperature:
                raise Interrupted
            return evaluate(*arguments, **named)

        measured.clear()
        monkeypatch.setattr(evaluate_stages, "evaluate", once)
        return evaluate_stages.run_evaluate(
            target, tokenizer, recipe, tmp_path / "drafter", prompts, tmp_path / "out"
        )

    with pytest.raises(Interrupted):
        stopped_at(1.0, recipe, asked)
    first = stopped_at(None, recipe, asked)
    assert measured == [1.0] and "evaluate-T0.json: is this very evaluation" in capsys.readouterr().err
    again = stopped_at(None, recipe, asked)
    assert measured == [] and [r.records for r in again] == [r.records for r in first]
    stopped_at(None, recipe, asked[:1])
    assert measured == [0.0, 1.0]
    stopped_at(None, recipe.model_copy(update={"evaluate": replace(recipe.evaluate, seed=1)}), asked[:1])
    assert measured == [0.0, 1.0]
    save_drafter(make_drafter(target, head="none"), tmp_path / "drafter", {}, torch.float32)
    stopped_at(None, recipe, asked[:1])
    assert measured == [0.0, 1.0]


def test_json_of_a_length_that_no_round_defines_has_null(target: TransformersTarget) -> None:
    settings = EvaluateSettings(max_new_tokens=1, batch_size=4, speed_prompts=0)
    result = evaluate(target, make_drafter(target), PROMPTS[:1], settings, Sampling(0.0))
    [told] = json.loads(evaluate_stages.summary([result]), parse_constant=pytest.fail)
    assert told["accepted_len"]["macro"] is None


def test_speed_is_the_engines_by_domain_and_of_all_tokens_over_all_seconds(
    target: TransformersTarget,
) -> None:
    settings = EvaluateSettings(max_new_tokens=6, batch_size=4, speed_prompts=2)
    bar = Counted()
    speed = evaluate(target, make_drafter(target), PROMPTS[:7], settings, Sampling(0.0), bar).speed
    assert bar.done == 7 and [(p.title, p.total, p.done) for p in bar.parts] == [("speed T=0", 4, 4)]
    assert list(speed) == ["code", "chat", "all"] and [s.prompts for s in speed.values()] == [2, 2, 4]
    for s in speed.values():
        assert 0 < s.low <= s.ratio <= s.high and 0 <= s.drafting <= 1
        assert s.ratio == pytest.approx(s.drafted_tokens_per_second / s.plain_tokens_per_second)


def test_a_ratio_is_that_of_sums_and_not_a_mean_of_ratios() -> None:
    """Two prompts: 100 tokens in 1 s without and 2 s with the drafter, 100 in 9 s and 3 s."""
    speed = _speed([[100, 1.0, 0, 0, 100, 2.0, 50, 25], [100, 9.0, 0, 0, 100, 3.0, 50, 50]])
    assert (speed.ratio, speed.plain_tokens_per_second, speed.drafted_tokens_per_second) == (2.0, 20.0, 40.0)
    assert (speed.prompts, speed.drafting, speed.low, speed.high) == pytest.approx((2, 0.75, 0.5, 3.0))


def test_timed_answers_have_no_seed_so_that_the_planner_may_rest(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int | None] = []
    add = Engine.add_request

    def spy(self: Engine, name: str, tokens: Sequence[int], params: SamplingParams) -> None:
        seeds.append(params.seed)
        add(self, name, tokens, params)

    monkeypatch.setattr(Engine, "add_request", spy)
    speed_module.measure_speed(target, make_drafter(target), {"code": [[4, 5]]}, Sampling(1.0), 6)
    assert seeds == [None] * 4  # both engines, warm-up and measured


def test_the_engine_without_a_drafter_is_the_baseline_and_both_are_warm(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []  # gamma of the engine, first token of the prompt

    def answer(engine: Engine, prompt: Sequence[int], *_: Any) -> list[float]:
        asked.append((engine.info.gamma, prompt[0]))
        return [1, 1.0, 0, 0]

    monkeypatch.setattr(speed_module, "_answer", answer)
    prompts = {"code": [[4, 5]], "chat": [[6, 7], [8, 9]]}
    drafter = make_drafter(target)
    speed_module.measure_speed(target, drafter, prompts, Sampling(0.0), 6)
    gamma, warm = drafter.gamma, 2 * len(prompts["code"] + prompts["chat"])
    assert asked[warm:] == [(gamma, 4), (0, 4), (0, 6), (gamma, 6), (gamma, 8), (0, 8)]
    assert {g for g, _ in asked[:warm]} == {0, gamma}

"""Evaluation counts the same rounds whether the engine or the reference loop made the answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftkit import stages
from draftkit.config import Recipe, load_recipe
from draftkit.data.conversations import Conversation, Message
from draftkit.draft.checkpoint import save_drafter
from draftkit.errors import Interrupted
from draftkit.evaluate.run import EvalPrompt, EvalResult, evaluate
from draftkit.ops.sampling import Sampling
from draftkit.settings import EvaluateSettings
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter

PROMPTS = [EvalPrompt(str(i), ["code", "chat"][i % 2], (4 + i % 20, 20, 31 + i)) for i in range(10)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_by_the_engine_are_those_of_the_reference_loop(target: TransformersTarget, temperature: float) -> None:
    settings = EvaluateSettings(max_new_tokens=24, batch_size=4, speed_prompts=0)
    drafter, ticks = make_drafter(target), []
    by_engine = evaluate(target, drafter, PROMPTS, settings, Sampling(temperature), lambda: ticks.append(1))
    by_loop = evaluate(target, drafter, PROMPTS, replace(settings, batch_size=1), Sampling(temperature))
    assert len(ticks) == len(PROMPTS) and by_engine.speed == {}
    for one, other in zip(by_engine.records, by_loop.records, strict=True):
        assert (one.prompt_id, one.new_tokens, one.finish_reason) == (other.prompt_id, other.new_tokens, other.finish_reason)
        # of a round that the limit cut, the engine verifies only what there is room for: only there may they differ
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

    def stopped_at(temperature: float | None, recipe: Recipe, prompts: list[Conversation]) -> list[EvalResult]:
        def once(*arguments: Any, **named: Any) -> EvalResult:
            measured.append(arguments[4].temperature)
            if measured[-1] == temperature:
                raise Interrupted
            return evaluate(*arguments, **named)

        measured.clear()
        monkeypatch.setattr(stages, "evaluate", once)
        return stages.run_evaluate(target, tokenizer, recipe, tmp_path / "drafter", prompts, tmp_path / "out")

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
    [told] = json.loads(stages.summary([result]), parse_constant=pytest.fail)
    assert told["accepted_len"]["macro"] is None


def test_speed_is_by_domain_and_its_mean(target: TransformersTarget) -> None:
    settings = EvaluateSettings(max_new_tokens=6, batch_size=4, speed_prompts=4)
    speed = evaluate(target, make_drafter(target), PROMPTS[:4], settings, Sampling(0.0)).speed
    assert list(speed) == ["code", "chat", "macro"]
    assert [s.prompts for s in speed.values()] == [2, 2, 4]
    assert speed["macro"].ratio == pytest.approx((speed["code"].ratio + speed["chat"].ratio) / 2)
    assert all(s.low_quartile <= s.ratio <= s.high_quartile for s in speed.values())

"""The doctor names each planted fault, alone and together with others, and says nothing of sound pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from checks.doctor_faults import Case, cases, remember
from draftkit import cli
from draftkit.doctor import examine as doctor
from draftkit.doctor.changes import trials
from draftkit.doctor.context import fallen
from draftkit.doctor.cost import drafted_tokens, sentences
from draftkit.doctor.examine import DoctorSettings, examine
from draftkit.doctor.pair import open_pair
from draftkit.doctor.recorded import GREEDY, Recorded, record, rounds_along
from draftkit.draft.checkpoint import open_drafter
from draftkit.engine.answers import sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.outputs import StepOutput
from draftkit.engine.settings import EngineSettings
from draftkit.errors import CheckpointError, ConfigError
from draftkit.evaluate.metrics import Interval
from draftkit.evaluate_stages import first_turns
from draftkit.schedule.step_rate import StepRate
from draftkit.stages import read_prompts
from draftkit.target.loading import load_target
from draftkit.target.place import EMBEDDED
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from support.faulty import (
    UNKNOWN,
    Fault,
    another_head,
    faulty,
    fields,
    opposite_order,
    with_copies,
    without,
)

DRAFTER = EMBEDDED / "drafter"


@pytest.fixture(scope="module")
def tiny() -> TransformersTarget:
    return load_target("tiny")


@pytest.fixture(scope="module")
def answers(tiny: TransformersTarget) -> list[Recorded]:
    shown = TemplateFormat(load_tokenizer("tiny"))
    prompts = first_turns(shown, read_prompts([EMBEDDED / "heldout.jsonl"]), 4)
    return record(tiny, prompts, 40)


@pytest.fixture(scope="module")
def once() -> Iterator[None]:
    """Targets are loaded, and answer, once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_target", "load_tokenizer", "record"):
            patch.setattr(doctor, name, getattr(doctor, name))  # as it was, afterwards
        remember()
        yield


SMALL = DoctorSettings(per_domain=3, max_new_tokens=24, context=64)
# SmolLM2 and longer answers take minutes: python -m checks.doctor_faults
CASES = [case for case in cases(SMALL) if "SmolLM2" not in case.name]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_planted_fault_is_named_and_nothing_in_a_sound_pair(case: Case, once: None, tmp_path: Path) -> None:
    found = case.run(tmp_path)
    named = {finding.check for finding in found}
    assert set(case.checks) <= named if case.more else set(case.checks) == named
    for finding in found:
        assert "cost: " in finding.line() and "mend: " in finding.line() and "\n" not in finding.line()


@pytest.mark.slow
def test_layers_one_too_high_are_named_where_they_do_not_even_load(once: None, tmp_path: Path) -> None:
    folder = faulty(tmp_path / "drafter", UNKNOWN, fields(target_layer_ids=[8, 13]))
    [finding] = examine("tiny", folder, SMALL).findings
    assert "[7, 12]" in finding.mend and "it does not load" in finding.cost


THETA = {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("layer ids", fields(target_layer_ids=[6, 11])),
        ("layer ids", fields(target_layer_ids=[8, 13])),
        ("layer order", opposite_order),
        ("block layout", fields(sample_from_anchor=False)),
        ("rotary embedding", fields(**THETA)),
        ("context window", fields(context_window=9)),
        ("mask token", fields(mask_token_id=17)),
        ("confidence head", fields(enable_confidence_head=False)),
        ("Markov head", fields(markov_rank=0)),
    ],
)
def test_a_trial_makes_the_sound_drafter_of_the_faulty_one(
    tiny: TransformersTarget, tmp_path: Path, check: str, fault: Fault
) -> None:
    """What running decides among: one of the changes that are tried undoes the fault, weights and shape."""
    sound = open_drafter(DRAFTER, tiny)
    pair = open_pair(faulty(tmp_path / "drafter", fault), tiny, load_tokenizer("tiny"))
    weights = sound.state_dict()
    made = []
    for trial in trials(pair):
        with suppress(CheckpointError):  # the opposite of the change may be no drafter
            made += [trial.pair.drafter(torch.float32)] if trial.check == check else []
    assert any(
        one.config == sound.config
        and all(torch.equal(weights[name], tensor) for name, tensor in one.state_dict().items())
        for one in made
        if one.state_dict().keys() == weights.keys()
    )


@pytest.mark.slow
def test_what_a_fault_costs_is_measured(once: None, tiny: TransformersTarget, tmp_path: Path) -> None:
    folder = faulty(tmp_path / "drafter", with_copies(tiny), another_head)
    [finding] = examine("tiny", folder, SMALL).findings
    assert "% of the accepted length" in finding.cost  # by running, not by names alone


@pytest.mark.slow
def test_facts_of_a_sound_pair(once: None) -> None:
    found = examine("tiny", DRAFTER, SMALL)
    assert any(fact.startswith("break-even") for fact in found.facts)


def test_rounds_along_recorded_answers_are_those_of_the_engine(
    tiny: TransformersTarget, answers: list[Recorded]
) -> None:
    drafter = open_drafter(DRAFTER, tiny)
    engine = Engine(tiny, drafter, EngineSettings(plan="fixed", max_running=1, prefix_reuse=False))
    for one in answers[:3]:
        length = len(one.tokens) - one.prompt_tokens
        params = sampling_params(GREEDY, length, 0)
        engine.add_request("x", list(one.tokens[: one.prompt_tokens]), params)
        outputs: list[StepOutput] = []
        while engine.has_work():
            outputs += engine.step()
        kept = [len(o.events) for o in outputs[1:]]
        along = rounds_along(drafter, one)
        assert along.emitted == sum(kept[: along.rounds])
        assert tuple(k - 1 for k in kept[: along.rounds]) == along.accepted_per_round


def test_a_length_that_falls_with_the_context_is_named() -> None:
    near, far = Interval(3.0, 2.8, 3.2), Interval(1.2, 1.1, 1.4)
    assert fallen({80: near, 500: near, 2000: near}) == []
    assert fallen({80: near, 500: near, 2000: Interval(1.2, 1.0, 2.9)}) == []  # it may be chance
    assert fallen({80: near, 500: far, 2000: far}) == []  # a history makes other questions
    [finding] = fallen({80: near, 500: near, 2000: far})
    assert finding.check == "long context" and "60 %" in finding.cost


def test_the_number_of_drafted_tokens_follows_from_step_rate_and_acceptance() -> None:
    """A pass of n tokens takes 1 + 0.1 n, drafting 0.2: the second draft pays, the third does not."""
    rate = StepRate((1, 2, 3, 4), (1.1, 1.2, 1.3, 1.4), (1,), (0.2,))
    found = drafted_tokens(rate, [0.8, 0.5, 0.1], token_by_token=False)
    assert [round(one.expected, 6) for one in found] == [1.8, 2.2, 2.24]
    assert [round(one.break_even, 6) for one in found] == [round(x / 1.1, 6) for x in (1.4, 1.5, 1.6)]
    assert max(found, key=lambda one: one.speed_up).drafted == 2
    assert "should draft 2" in sentences(found)[1]
    assert "does not pay" in sentences(drafted_tokens(rate, [0.1, 0.1, 0.1], False))[1]


@pytest.mark.slow
def test_the_exit_code_says_whether_something_was_found(once: None, tmp_path: Path) -> None:
    bad = faulty(tmp_path / "drafter", fields(confidence_head_with_markov=None))
    for folder, code in ((DRAFTER, 0), (bad, 1)):
        done = CliRunner().invoke(cli.app, ["doctor", "-d", str(folder), "--json", "--context", "64"])
        assert done.exit_code == code, done.output
        assert len(json.loads(done.stdout)["findings"]) == code


@pytest.mark.slow
def test_what_an_engine_refuses_is_found(once: None, tmp_path: Path) -> None:
    folder = faulty(
        tmp_path / "dflash-like", fields(confidence_head_with_markov=False), without("confidence")
    )
    found = examine("tiny", DRAFTER, SMALL, engine="vllm")
    assert found.findings == ()
    assert any("0.33.0" in fact for fact in found.facts)
    found = examine("tiny", folder, SMALL, engine="vllm")
    assert "vllm method" in {f.check for f in found.findings}


def test_bad_input_is_an_error_and_no_finding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine 'tgi' is not known, choose one of vllm"):
        examine("tiny", DRAFTER, DoctorSettings(), engine="tgi")
    found = examine("tiny", tmp_path, DoctorSettings())
    assert [f.check for f in found.findings] == ["files"]
    with pytest.raises(CheckpointError):
        open_drafter(tmp_path, load_target("tiny"))

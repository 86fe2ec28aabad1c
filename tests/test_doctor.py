"""The doctor names each planted fault, alone and together with others, and says nothing of sound pairs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from draftkit import cli
from draftkit.doctor import examine as doctor
from draftkit.doctor.changes import trials
from draftkit.doctor.context import fallen
from draftkit.doctor.cost import drafted_tokens, sentences
from draftkit.doctor.examine import DoctorSettings, examine
from draftkit.doctor.pair import open_pair
from draftkit.doctor.recorded import GREEDY, Recorded, record, rounds_along
from draftkit.draft.checkpoint import open_drafter, save_drafter
from draftkit.engine.answers import sampling_params
from draftkit.engine.engine import Engine
from draftkit.engine.outputs import StepOutput
from draftkit.engine.settings import EngineSettings
from draftkit.errors import CheckpointError, ConfigError
from draftkit.evaluate.metrics import Interval
from draftkit.schedule.step_rate import StepRate
from draftkit.stages import first_turns, read_prompts
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import DTYPES, EMBEDDED, TransformersTarget, load_target
from support.faulty import (
    Fault,
    another_head,
    faulty,
    fields,
    noted,
    opposite_order,
    prefixed,
    reduced,
    untrained,
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


@pytest.fixture
def quickly(
    monkeypatch: pytest.MonkeyPatch, tiny: TransformersTarget, answers: list[Recorded]
) -> DoctorSettings:
    """What does not depend on the drafter is done once for all tests: loading the target, its answers."""
    monkeypatch.setattr(doctor, "load_target", lambda *a, **k: tiny)
    monkeypatch.setattr(doctor, "record", lambda *a, **k: answers)
    return DoctorSettings(context=64)


UNKNOWN = noted(recipe={})  # the folder's note says nothing of the training: only running can tell
FAULTS: dict[str, tuple[Fault, ...]] = {
    "layer ids": (fields(target_layer_ids=[6, 11]),),
    "block size": (fields(block_size=5),),
    "block layout": (fields(sample_from_anchor=False),),
    "mask token": (UNKNOWN, fields(mask_token_id=17)),
    "Markov head": (without("markov_head."),),
    "confidence head": (without("confidence_head."),),
    "confidence defaults": (fields(confidence_head_with_markov=None),),
    "tensor names": (prefixed,),
    "vocab size": (fields(vocab_size=4100),),
    "hidden size": (fields(hidden_size=128),),
    "context range": (fields(max_position_embeddings=512),),
    "context window": (UNKNOWN, fields(context_window=1)),
    "quantised drafter": (fields(quantization_config={"quant_method": "gptq"}),),
    "proposals": (untrained,),
    "target": (noted(target_fingerprint="0" * 64, target="another"),),
    "chat template": (noted(template_hash="0" * 64),),
    "template switches": (noted(template_switches={"enable_thinking": False}),),
    "card": (noted(validation={"code": 5.5, "math": 6.5, "loss": 1.0}),),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", FAULTS)
def test_a_planted_fault_is_named(quickly: DoctorSettings, tmp_path: Path, check: str) -> None:
    found = examine("tiny", faulty(tmp_path / "drafter", *FAULTS[check]), quickly)
    assert [f.check for f in found.findings] == [check]
    line = found.findings[0].line()
    assert "cost: " in line and "mend: " in line and "\n" not in line


@pytest.mark.slow
def test_layers_one_too_high_are_named_where_they_do_not_even_load(
    quickly: DoctorSettings, tmp_path: Path
) -> None:
    folder = faulty(tmp_path / "drafter", UNKNOWN, fields(target_layer_ids=[8, 13]))
    [finding] = examine("tiny", folder, quickly).findings
    assert finding.check == "layer ids"
    assert "[7, 12]" in finding.mend and "it does not load" in finding.cost


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factors", "check"), [((16.0, 1.0), "embedding"), ((1.0, 3.0), "head")], ids=["embedding", "head"]
)
def test_a_copy_that_is_not_the_targets_is_named(
    quickly: DoctorSettings,
    tiny: TransformersTarget,
    tmp_path: Path,
    factors: tuple[float, float],
    check: str,
) -> None:
    """A scaled head changes no greedy base token, but it outweighs the Markov head's."""
    found = examine("tiny", faulty(tmp_path / "drafter", with_copies(tiny, *factors)), quickly)
    assert [f.check for f in found.findings] == [check]


@pytest.mark.slow
@pytest.mark.parametrize(("absolute", "lost"), [(True, False), (False, True)])
def test_a_wrong_or_missing_draft_vocabulary_is_named(
    quickly: DoctorSettings, tiny: TransformersTarget, tmp_path: Path, absolute: bool, lost: bool
) -> None:
    found = examine("tiny", faulty(tmp_path / "drafter", reduced(tiny, absolute, lost)), quickly)
    assert "draft vocabulary" in {f.check for f in found.findings}


@pytest.mark.slow
@pytest.mark.parametrize(
    "checks",
    [
        ("mask token", "confidence defaults", "chat template"),
        ("layer ids", "tensor names", "template switches"),
    ],
    ids="+".join,
)
def test_faults_that_meet_are_named_each(
    quickly: DoctorSettings, tmp_path: Path, checks: tuple[str, ...]
) -> None:
    faults = [fault for check in checks for fault in FAULTS[check]]
    found = examine("tiny", faulty(tmp_path / "drafter", *faults), quickly)
    assert {f.check for f in found.findings} == set(checks)


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
def test_another_head_is_named_and_mended_by_the_targets(
    quickly: DoctorSettings, tiny: TransformersTarget, tmp_path: Path
) -> None:
    found = examine("tiny", faulty(tmp_path / "drafter", with_copies(tiny), another_head), quickly)
    [finding] = found.findings
    assert finding.check == "head"
    assert "% of the accepted length" in finding.cost  # by running, not by names alone


@pytest.mark.slow
@pytest.mark.parametrize("form", ["as packaged", "portable", "deepspec", "float32"])
def test_nothing_is_found_in_a_sound_pair(
    quickly: DoctorSettings, tiny: TransformersTarget, tmp_path: Path, form: str
) -> None:
    folder = DRAFTER
    if form != "as packaged":
        folder, note = tmp_path / form, json.loads((DRAFTER / "draftkit.json").read_text("utf-8"))
        kept = {k: note[k] for k in ("target", "target_fingerprint", "template_hash", "validation")}
        dtype = DTYPES["float32" if form == "float32" else "bfloat16"]
        save_drafter(
            open_drafter(DRAFTER, tiny), folder, kept, dtype, "deepspec" if form == "deepspec" else "portable"
        )
    found = examine("tiny", folder, DoctorSettings(context=512))
    assert found.findings == ()
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
def test_the_exit_code_says_whether_something_was_found(quickly: DoctorSettings, tmp_path: Path) -> None:
    bad = faulty(tmp_path / "drafter", fields(confidence_head_with_markov=None))
    for folder, code in ((DRAFTER, 0), (bad, 1)):
        done = CliRunner().invoke(cli.app, ["doctor", "-d", str(folder), "--json", "--context", "64"])
        assert done.exit_code == code, done.output
        assert len(json.loads(done.stdout)["findings"]) == code


@pytest.mark.slow
def test_what_an_engine_refuses_is_found(quickly: DoctorSettings, tmp_path: Path) -> None:
    folder = faulty(
        tmp_path / "dflash-like", fields(confidence_head_with_markov=False), without("confidence")
    )
    found = examine("tiny", DRAFTER, quickly, engine="vllm")
    assert found.findings == ()
    assert any("0.33.0" in fact for fact in found.facts)
    found = examine("tiny", folder, quickly, engine="vllm")
    assert "vllm method" in {f.check for f in found.findings}


def test_bad_input_is_an_error_and_no_finding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine 'tgi' is not known, choose one of vllm"):
        examine("tiny", DRAFTER, DoctorSettings(), engine="tgi")
    found = examine("tiny", tmp_path, DoctorSettings())
    assert [f.check for f in found.findings] == ["files"]
    with pytest.raises(CheckpointError):
        open_drafter(tmp_path, load_target("tiny"))

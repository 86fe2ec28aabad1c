"""Files of `draftkit profile` and `draftkit calibrate` in the server: what they change, and what does not
belong there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import openai
import pytest

from draftkit.artefact import sealed
from draftkit.engine.settings import EngineSettings
from draftkit.errors import ScheduleError
from draftkit.schedule.calibration import Calibration, load_calibration, save_calibration
from draftkit.schedule.step_rate_table import Measured, StepRateTable, load_step_rate, save_step_rate
from draftkit.serve import pair
from draftkit.serve.llm import LLM
from draftkit.serve.pair import PlanFiles, find_drafter, open_pair
from draftkit.target.fingerprint import fingerprint
from draftkit.target.place import EMBEDDED, EMBEDDED_PAIR
from support.server import SERVE, serving

DRAFTER = EMBEDDED / "drafter"
OWN = PlanFiles(EMBEDDED_PAIR / "step_rate.json", EMBEDDED_PAIR / "calibration.json")
SMALL = EngineSettings(max_running=2, max_length=64, kv_bytes=2**22, compile=False)


def free_passes(path: Path) -> Path:
    """A step rate of the embedded pair on a machine where a pass costs the same whatever it holds."""
    own = Measured(
        target="tiny", target_fingerprint=fingerprint(EMBEDDED), drafter_fingerprint=fingerprint(DRAFTER)
    )
    save_step_rate(StepRateTable((64,), (1, 1024), ((1.0, 1.0001),), (1,), (0.0001,), measured=own), path)
    return path


def test_the_server_plans_by_the_files_that_it_is_given(tmp_path: Path) -> None:
    """Where passes are free everything that a confidence above zero speaks for is verified, and the log says
    who spoke."""
    step_rate = free_passes(tmp_path / "step_rate.json")
    files = ("--step-rate", str(step_rate), "--calibration", str(OWN.calibration))
    with serving(*files, command=SERVE) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
        question = [{"role": "user", "content": "Solve for x: 3x + 4 = 19."}]
        answer = client.chat.completions.create(model="tiny", messages=question, max_tokens=48, temperature=0)  # type: ignore[arg-type]
        assert answer.usage is not None and answer.usage.completion_tokens > 8
        verified = server.metric("spec_decode_num_verified_tokens_total")
        assert verified > 0.7 * server.metric("spec_decode_num_draft_tokens_total") > 0
        assert 0 <= server.metric("confidence_calibration_error") <= 1


@pytest.mark.parametrize("name", pair.PACKAGED)
def test_what_is_packaged_belongs_together(name: str) -> None:
    packaged = pair.PACKAGED[name]
    own = fingerprint(packaged.folder)
    gamma = json.loads((packaged.folder / "config.json").read_text("utf-8"))["block_size"]
    assert load_calibration(packaged.calibration, gamma, own).num_samples > 1000


def test_the_embedded_pair_takes_the_calibration_of_its_own_drafter_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "draftkit.serve")
    engine, _ = open_pair("tiny", None, SMALL)
    assert engine.calibration == load_calibration(EMBEDDED_PAIR / "calibration.json", 7, fingerprint(DRAFTER))
    engine, _ = open_pair("tiny", str(DRAFTER), SMALL)
    assert engine.calibration is None  # a drafter that was named gets what was named with it
    save_calibration(Calibration((1.0,) * 7, drafter_fingerprint="another"), tmp_path / "c.json")
    monkeypatch.setitem(pair.PACKAGED, "tiny", pair.PackagedDrafter(DRAFTER, tmp_path / "c.json"))
    engine, _ = open_pair("tiny", None, SMALL)
    assert engine.calibration is None
    assert "calibration of another drafter" in caplog.messages[-2]


def test_the_embedded_targets_own_drafter_does_not_depend_on_the_working_directory() -> None:
    assert find_drafter("tiny", None) == DRAFTER and DRAFTER.is_dir()
    assert (find_drafter("tiny", "none"), find_drafter("another", None)) == (None, None)
    assert find_drafter("tiny", "own") == find_drafter("another", "own") == Path("own")


def test_both_files_reach_the_planner_of_an_llm(tmp_path: Path) -> None:
    calibration = Calibration((0.5, 1.0, 2.0, 1.0, 1.0, 1.0, 4.0), fingerprint(DRAFTER))
    save_calibration(calibration, tmp_path / "calibration.json")
    assert OWN.step_rate is not None
    llm = LLM(
        "tiny", str(DRAFTER), SMALL, step_rate=OWN.step_rate, calibration=str(tmp_path / "calibration.json")
    )
    planner = llm.engine._planner
    assert planner.step_rate == load_step_rate(OWN.step_rate).middle()
    said_DG = np.full((2, 7), 0.9)
    found_DG = planner.confidence(said_DG, None)
    assert found_DG is not None
    np.testing.assert_allclose(found_DG, calibration.apply(said_DG))
    assert found_DG[0, 0] > 0.9 > found_DG[0, 2] > found_DG[0, 6]


def test_files_of_another_pair_are_refused(tmp_path: Path) -> None:
    assert OWN.step_rate and OWN.calibration
    table, calibration = load_step_rate(OWN.step_rate), json.loads(OWN.calibration.read_text())
    measured = json.loads(OWN.step_rate.read_text())["draftkit"]
    wrong: list[tuple[str, dict[str, object], str]] = [
        ("calibration", calibration | {"drafter_fingerprint": "f" * 64}, "calibration of another drafter"),
        (
            "calibration",
            calibration | {"temperatures": [1.0] * 5},
            "calibration of 5 positions, the drafter has 7",
        ),
        ("calibration", {}, "is no calibration"),
        ("step_rate", {}, "is no step-rate table"),
        ("step_rate", {"draftkit": measured | {"tokens": []}}, "0 points of tokens and 16 values"),
        *(
            (
                "step_rate",
                {"draftkit": measured | {"measured": vars(table.measured) | {name: "f" * 64}}},
                message,
            )
            for name, message in (
                ("target_fingerprint", "step rate of another target"),
                ("drafter_fingerprint", "step rate of another drafter"),
            )
        ),
        ("step_rate", {"draftkit": measured | {"draft_seconds": [0.0] * 7}}, "without a drafter's time"),
    ]
    for name, content, message in wrong:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(sealed(content)))
        with pytest.raises(ScheduleError, match=message):
            open_pair("tiny", None, SMALL, PlanFiles(**{name: path}))
    with pytest.raises(ScheduleError, match="there is no drafter"):
        open_pair("tiny", "none", SMALL, OWN)

"""Step rates: what holds between, below and above the measured points, and what a wrong table is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from draftkit.errors import ScheduleError
from draftkit.evaluate.profile import ProfileSettings, profile
from draftkit.schedule.step_rate import StepRate
from draftkit.schedule.step_rate_table import Measured, StepRateTable, load_step_rate, save_step_rate
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter, make_eagle

TABLE = StepRateTable(
    contexts=(64, 256),
    tokens=(1, 8, 16),
    pass_seconds=((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)),
    draft_requests=(1, 4),
    draft_seconds=(0.1, 0.4),
    measured=Measured(target="tiny", target_fingerprint="aa", repeats=3),
)


def seconds(rate: StepRate, *tokens: int) -> list[float]:
    return rate.target_seconds(np.array(tokens)).tolist()


def test_between_points_it_is_linear_or_a_staircase_that_pads_up() -> None:
    assert seconds(StepRate((2, 4), (1.0, 3.0)), 2, 3, 4) == [1.0, 2.0, 3.0]
    assert seconds(StepRate((2, 4, 8), (1.0, 3.0, 9.0), interpolation="staircase"), 1, 2, 3, 4, 5) == [
        1,
        1,
        3,
        3,
        9,
    ]


def test_outside_the_first_value_holds_and_the_last_grows_in_proportion_and_it_says_so() -> None:
    for kind in ("linear", "staircase"):
        rate = StepRate((2, 4), (1.0, 3.0), interpolation=kind)
        assert seconds(rate, 1, 8, 40) == [1.0, 6.0, 30.0]
    assert rate.assumption(4) is None
    assert "up to 4 tokens" in str(rate.assumption(40))
    assert "in proportion" in str(rate.assumption(40))


def test_the_drafters_time_adds_to_the_pass() -> None:
    rate = TABLE.at(64)
    assert rate.drafter_seconds(1) == pytest.approx(0.1)
    assert rate.step_seconds(4, np.array([8])).tolist() == pytest.approx([2.4])


def test_context_is_linear_between_the_measured_lengths_and_constant_outside() -> None:
    assert [seconds(TABLE.at(c), 8)[0] for c in (0, 64, 160, 256, 999)] == [2.0, 2.0, 3.0, 4.0, 4.0]
    assert TABLE.assumptions(16, 256) == []
    assert any("256 tokens of context" in a for a in TABLE.assumptions(16, 300))
    assert any("names no target" in a for a in StepRateTable((0,), (1,), ((1.0,),)).assumptions(1, 0))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (((), ()), "at least one"),
        (((1, 2), (1.0,)), "2 points of tokens and 1 values"),
        (((1, 1), (1.0, 1.0)), "ascending"),
        (((0, 1), (1.0, 1.0)), "at least 1"),
        (((1, 2), (1.0, 0.0)), "0.0 seconds"),
        (((1, 2), (1.0, -2.0)), "-2.0 seconds"),
        (((1, 2), (1.0, float("nan"))), "nan seconds"),
        (((1, 2), (1.0, float("inf"))), "inf seconds"),
    ],
)
def test_impossible_points_are_refused(
    points: tuple[tuple[int, ...], tuple[float, ...]], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        StepRate(*points)


def test_a_table_is_read_back_and_its_top_level_is_sglangs_additive_one(tmp_path: Path) -> None:
    path = tmp_path / "step_rate.json"
    save_step_rate(TABLE, path)
    assert load_step_rate(path) == TABLE
    text = path.read_text()
    theirs = json.loads(text)
    assert '"bias_seconds"' in text  # how SGLang tells the two kinds of table apart
    assert theirs["bias_seconds"] > 0
    for probes, values in (("bs_probes", "alpha_seconds"), ("m_probes", "theta_seconds")):
        assert len(theirs[probes]) == len(theirs[values]) > 0
        assert theirs[probes] == sorted(set(theirs[probes]))
    whole = theirs["bias_seconds"] + theirs["alpha_seconds"][1] + theirs["theta_seconds"][2]
    assert whole == pytest.approx(TABLE.at(256).step_seconds(4, np.array([16]))[0])


def test_tables_of_sglangs_profiler_are_read(tmp_path: Path) -> None:
    plain = tmp_path / "plain.json"
    plain.write_text(
        '{"sample_batch_tokens": [8, 16], "sample_steps_per_sec": [4.0, 2.0], "max_batch_tokens": 16}'
    )
    assert load_step_rate(plain).at(0) == StepRate((8, 16), (0.25, 0.5))
    additive = tmp_path / "additive.json"
    additive.write_text(
        '{"bias_seconds": 1.0, "bs_probes": [1, 2], "alpha_seconds": [0.5, 0.75],'
        ' "m_probes": [1, 9], "theta_seconds": [0.0, 1.0]}'
    )
    assert load_step_rate(additive).at(0) == StepRate((1, 9), (1.0, 2.0), (1, 2), (0.5, 0.75))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no step-rate table"),
        ("[1]", "no step-rate table"),
        ("{}", "no step-rate table"),
        ('{"draftkit": {"format": "draftkit-step-rate-9"}}', "another version"),
        ('{"sample_batch_tokens": [], "sample_steps_per_sec": []}', "at least one"),
        ('{"sample_batch_tokens": [1], "sample_steps_per_sec": [0.0]}', "must be positive"),
        ("[" * 10**5, "no step-rate table"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=message) as error:
        load_step_rate(path)
    assert "table.json" in str(error.value)


def test_a_binary_file_is_told_in_one_short_line(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(bytes(range(256)) * 1000)
    with pytest.raises(ScheduleError, match="no step-rate table") as error:
        load_step_rate(tmp_path / "t")
    assert len(str(error.value)) < 400


def test_a_table_of_another_target_is_refused() -> None:
    TABLE.check_target("aa")
    with pytest.raises(ScheduleError, match="another target"):
        TABLE.check_target("bb")
    StepRateTable((0,), (1,), ((1.0,),)).check_target("bb")  # names none: taken, and `assumptions` says so


def test_a_profile_says_what_it_measured_and_with_which_passes(target: TransformersTarget) -> None:
    settings, ticks = ProfileSettings((1, 6), (8, 16), (1, 2), repeats=2), [0]

    def tick() -> None:
        ticks[0] += 1

    table = profile(target, make_drafter(target), "drafter-1", settings, tick)
    assert (table.tokens, table.contexts, table.draft_requests) == ((1, 6), (8, 16), (1, 2))
    assert ticks == [(2 * 2 + 2) * 2]
    assert min(*(min(row) for row in table.pass_seconds), *table.draft_seconds) > 0
    assert table.measured.passes == "PyTorch operations"  # float64: compiled passes are float32
    assert (table.measured.target_fingerprint, table.measured.drafter_fingerprint) == (
        target.info.fingerprint,
        "drafter-1",
    )
    with pytest.raises(ScheduleError, match="choose shorter contexts"):
        profile(target, None, "", replace(settings, contexts=(5000,)))
    with pytest.raises(
        ScheduleError, match=r"^profile: 1000000000 tokens per pass after 16 .* choose fewer$"
    ):
        profile(target, make_drafter(target), "", replace(settings, tokens=(10**9,)))


def test_drafting_of_eagle3_is_measured_too(target: TransformersTarget) -> None:
    table = profile(
        target, make_eagle(target, (5, 7, 9)), "eagle", ProfileSettings((1, 6), (8,), (1, 2), repeats=1)
    )
    assert table.draft_requests == (1, 2) and min(table.draft_seconds) > 0


def test_a_target_without_a_lean_forward_is_refused_with_its_reason(
    target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftkit.evaluate.profile.unsupported", lambda _: "family mamba has no lean forward")
    with pytest.raises(ScheduleError, match="profile: family mamba"):
        profile(target, None, "", ProfileSettings((1,), (8,), (1,), repeats=1))

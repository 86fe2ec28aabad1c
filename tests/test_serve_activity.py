"""The server's log says every ten seconds what it does, while it does something."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from draftkit.engine.metrics import EngineMetrics
from draftkit.schedule.gate import GateState
from draftkit.serve.activity import PERIOD, ActivityLog
from draftkit.serve.metrics import ServerMetrics
from support.server import serving


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "draftkit.serve"]


def test_a_line_is_about_the_last_ten_seconds_and_an_idle_server_is_silent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    activity, before = (
        ActivityLog(gamma=4),
        EngineMetrics(rounds=100, drafted=400, verified=400, accepted=400),
    )
    assert activity.due(0.0)
    activity.look(0.0, 5000, before)
    assert not activity.due(PERIOD - 1) and activity.due(PERIOD)
    after = replace(before, rounds=150, drafted=500, verified=480, accepted=460, running=3, waiting=1)
    activity.look(PERIOD, 5250, after)
    activity.look(2 * PERIOD, 5250, after)
    assert lines(caplog) == [
        "last 10 s: 25.0 tokens/s, 3 running, 1 waiting, accepted length 2.20, drafted in 50 % of rounds, "
        "75 % of verified drafts accepted"
    ]


def test_a_drafter_that_rests_is_told_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    activity = ActivityLog(gamma=4)
    activity.look(0.0, 0, EngineMetrics())
    activity.look(PERIOD, 1000, EngineMetrics(rounds=1000, gate=GateState(False, 80.4, 100.2)))
    [line] = lines(caplog)
    assert line.endswith("drafted in 0 % of rounds, the drafter rests: 80 tokens/s with it, 100 without")


def test_a_server_under_load_writes_the_line() -> None:
    period = ("--constant", "draftkit.serve.activity.PERIOD=0.5")
    endless = {"prompt": "x", "max_tokens": 900_000_000, "ignore_eos": True}
    with (
        serving("--step-seconds", "0.01", "--max-length", "1000000000", *period) as server,
        server.ask("/v1/completions", endless),
    ):
        line = server.logged(r"last \d+ s: .* drafted in")
    assert "tokens/s, 1 running" in line and "accepted length 3.00, drafted in 100 % of rounds" in line


def test_monitors_are_told_whether_the_drafter_rests() -> None:
    class Engine:
        metrics = EngineMetrics()

    metrics = ServerMetrics()
    metrics.watch(Engine, "m")
    assert b"spec_decode_drafting" not in metrics.render()
    Engine.metrics = EngineMetrics(gate=GateState(False, 80.0, 100.0))
    text = metrics.render().decode()
    assert 'draftkit:spec_decode_drafting{model_name="m"} 0.0' in text
    assert 'draftkit:spec_decode_tokens_per_second{drafts="on",model_name="m"} 80.0' in text
    assert 'draftkit:spec_decode_tokens_per_second{drafts="off",model_name="m"} 100.0' in text

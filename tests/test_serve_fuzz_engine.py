"""Bodies drawn from the real server's own description; `checks/fuzz.py` sends thousands of them."""

from __future__ import annotations

from collections import Counter

import httpx
import pytest

from benchmarks.server_process import server_process
from checks.fuzz import OPTIONS, Report, fuzz, what_is_wrong


@pytest.mark.slow
def test_hundreds_of_requests_of_all_kinds_leave_the_real_server_as_it_was() -> None:
    with server_process(*OPTIONS) as server:
        report = fuzz(server, 600)
        assert server.process.poll() is None
    assert report.failures == [] and report.wrong_controls == 0
    assert (report.tracebacks, report.leaked_blocks, report.ready_at_end) == (0, 0, True)
    assert report.cases >= 600 and report.controls > 10 and report.streams > 10
    assert set(report.by_status) <= {"200", "400", "404", "405", "413", "415"}
    assert report.by_status["200"] > 100 and report.by_status["400"] > 100 and len(report.refused) > 8


def test_what_a_fuzz_run_must_not_overlook() -> None:
    kinds = {"json": "application/json", "stream": "text/event-stream; charset=utf-8"}
    right = httpx.Response(400, json={"error": {"message": "n: too many", "code": 400}})
    assert not what_is_wrong(right, "POST")
    wrong = [
        httpx.Response(500, json={"error": {"message": "x", "code": 500}}),
        httpx.Response(429, json={"error": {"message": "x", "code": 429}}),
        httpx.Response(400, json={"error": {"message": "", "code": 400}}),
        httpx.Response(200, text="data: {}\n\n", headers={"content-type": kinds["stream"]}),
        httpx.Response(
            200, text='data: {"error": {}}\n\ndata: [DONE]\n\n', headers={"content-type": kinds["stream"]}
        ),
    ]
    assert all(what_is_wrong(response, "POST") for response in wrong)
    for response in (
        httpx.Response(400, text="oh"),
        httpx.Response(200, text="oh", headers={"content-type": kinds["json"]}),
    ):
        with pytest.raises(ValueError, match="Expecting value"):
            what_is_wrong(response, "POST")


def test_a_fuzz_run_with_a_failure_is_not_good() -> None:
    fine = {"cases": 3, "controls": 3, "ready_at_end": True, "statuses": {"POST /": Counter({"200": 3})}}
    assert Report(**fine).good  # type: ignore[arg-type]
    bad = {
        "failures": ["x"],
        "wrong_controls": 1,
        "tracebacks": 1,
        "leaked_blocks": 1,
        "ready_at_end": False,
        "controls": 0,
    }
    for name, value in bad.items():
        assert not Report(**fine | {name: value}).good  # type: ignore[arg-type]

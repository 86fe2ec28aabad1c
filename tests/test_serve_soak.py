"""A small HTTP soak of the real server; `checks/soak_http.py` does the same with ten thousand requests."""

from __future__ import annotations

import pytest

from benchmarks.server_process import server_process
from checks.soak_http import Report, Soak, read_questions
from draftkit.target.loading import load_target


@pytest.mark.slow
def test_clients_that_come_and_go_leave_nothing_and_greedy_answers_are_the_reference_loops() -> None:
    """In a memory that makes requests give way to each other."""
    target = load_target("tiny")
    questions = read_questions(target, "tiny", 12, 60)
    with server_process("--port", "0", "--max-length", "128", "--kv-gib", str(3.1 / 1024)) as server:
        report = Soak(server, target, questions, 60).run(requests=150, concurrency=16)
    assert report.first_errors == [] and report.errors == 0
    assert report.requests == 150
    left = (report.left_sending, report.left_waiting, report.left_reading)
    assert min(left) > 0 and report.answered + sum(left) + report.refused_on_purpose == 150
    assert report.refused_on_purpose > 0 and report.preemptions > 0
    assert report.greedy_checked > 30 and report.greedy_with_stop > 8 and report.json_checked > 3
    assert (report.greedy_wrong, report.json_wrong, report.wrong_ends, report.tracebacks) == (0, 0, 0, 0)
    assert (report.leaked_requests, report.leaked_blocks) == (0, 0)


def test_a_soak_with_an_error_or_a_leak_is_not_good() -> None:
    fine = {"greedy_checked": 9, "megabytes_early": 100.0, "megabytes_end": 105.0}
    assert Report(**fine).good  # type: ignore[arg-type]
    counts = (
        "greedy_wrong",
        "json_wrong",
        "wrong_ends",
        "errors",
        "tracebacks",
        "leaked_requests",
        "leaked_blocks",
    )
    for name, value in {**dict.fromkeys(counts, 1), "megabytes_end": 200.0, "greedy_checked": 0}.items():
        assert not Report(**fine | {name: value}).good  # type: ignore[arg-type]

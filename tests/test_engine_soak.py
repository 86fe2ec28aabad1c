"""Hundreds of random requests through one engine; `checks/soak.py` does the same with ten thousand."""

from __future__ import annotations

import pytest

from checks.soak import Report, soak
from draftkit.engine.engine import Engine
from draftkit.target.transformers import TransformersTarget
from support.drafters import make_drafter
from support.engine import PROMPTS, small


@pytest.mark.slow
def test_random_requests_leave_nothing_and_greedy_answers_are_the_reference_loops(
    target: TransformersTarget,
) -> None:
    """In a memory that makes requests give way to each other."""
    engine = Engine(
        target, make_drafter(target), small(plan="planned", kv_bytes=2**18, max_running=16, max_length=128)
    )
    report = soak(engine, target, PROMPTS, requests=400, concurrency=16, most=40)
    assert report.finished + report.aborted == 400 and report.aborted > 10
    assert report.preemptions > 0 and report.greedy_checked > 50 and report.prompts_scored > 20
    assert (report.greedy_wrong, report.greedy_ties, report.wrong_ends, report.leaked_blocks) == (0, 0, 0, 0)
    assert report.prompts_wrong == 0
    assert not engine.has_work()


def test_a_soak_with_a_wrong_answer_or_a_leak_is_not_good() -> None:
    fine = {"greedy_checked": 9, "prompts_scored": 9, "megabytes_early": 100.0, "megabytes_end": 105.0}
    assert Report(**fine).good  # type: ignore[arg-type]
    wrong = {
        "greedy_wrong": 1,
        "prompts_wrong": 1,
        "leaked_blocks": 1,
        "wrong_ends": 1,
        "megabytes_end": 200.0,
    }
    wrong |= {"greedy_checked": 0, "prompts_scored": 0}
    for name, value in wrong.items():
        assert not Report(**fine | {name: value}).good  # type: ignore[arg-type]

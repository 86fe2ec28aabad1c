"""The engine's planner between steps: long rests are counted without asking, as long as nobody's part in them changes."""

from __future__ import annotations

from draftkit.engine.kv_cache import BlockTable
from draftkit.engine.plan import LengthPlanner
from draftkit.engine.request import SamplingParams
from draftkit.engine.running import Running, Uniforms
from draftkit.schedule.account import ALLOWANCE, TAX
from draftkit.schedule.step_rate import StepRate

GAMMA = 4


def running(made: int, deaf: bool, row: int, limit: int = 100, gamma: int = GAMMA) -> Running:
    """A request with so many tokens of its answer."""
    request = Running(str(row), SamplingParams(), [1] * (3 + made), 3, limit, {}, Uniforms(0, gamma), gamma, row)
    request.deaf, request.table = deaf, BlockTable(heard=not deaf)
    return request


def planner() -> LengthPlanner:
    """One that has no credit left at any of the loads used here."""
    found = LengthPlanner(4, GAMMA)
    found.use(StepRate((1, 8), (1.0, 2.0), (1,), (1.0,)))
    assert found._speculation is not None
    for requests in (1, 2):
        found._speculation._load(requests).account.credit = -3.0
    return found


def test_a_rest_of_those_who_do_not_listen_is_told_to_the_account_in_one_piece() -> None:
    plan, alone = planner(), [running(5, deaf=True, row=0)]
    for _ in range(50):
        assert plan.choose_drafting(alone) == []
    assert plan.listening_in_rest is False
    assert plan._speculation is not None
    load = plan._speculation._load(1)
    assert load.account.credit == -3.0 + TAX
    plan.forget(0)
    assert abs(load.account.credit - (-3.0 + 50 * TAX)) < 1e-9 < ALLOWANCE
    assert plan.listening_in_rest is None


def test_who_listens_without_drafting_is_asked_about_in_every_step() -> None:
    """The last token of an answer, and a request that is not to draft, belong to blocks that the drafter's half is kept for."""
    for listener in (running(99, deaf=False, row=1), running(5, deaf=False, row=1, gamma=0)):
        plan, both = planner(), [running(5, deaf=True, row=0), listener]
        for _ in range(3):
            assert plan.choose_drafting(both) == [] and plan.listening_in_rest is None


def test_those_who_listen_are_asked_again_before_long() -> None:
    plan, alone = planner(), [running(5, deaf=False, row=0)]
    asked = 0
    for _ in range(300):
        assert plan.choose_drafting(alone) == []
        asked += plan.listening_in_rest is None
        assert plan.listening_in_rest in (None, True)
    assert 3 <= asked < 60

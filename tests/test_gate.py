"""The gate: the faster way is used, whatever was predicted; a probe costs one percent, and a change is found
out."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest

from draftkit.schedule.gate import EVIDENCE, FIRST_PAUSE, MEMORY, MOST_LOST, SHORTEST, Gate

GAMMA = 7
PROBE = SHORTEST + EVIDENCE  # steps of a request that is alone


class World:
    """Requests for ever. A step without drafting takes 1 and brings a token each; one with drafting takes
    `cost`, and each drafted token is kept with chance `kept` given those before it."""

    def __init__(self, kept: float, cost: float, seed: int = 0) -> None:
        self.kept, self.cost, self.rng = kept, cost, np.random.default_rng(seed)

    def ratio(self) -> float:
        """Speed of drafting over that of not drafting, in the mean."""
        return (1 + sum(self.kept**k for k in range(1, GAMMA + 1))) / self.cost

    def run(self, gate: Gate, requests: int, steps: int) -> tuple[float, float]:
        """Tokens per second over those of no drafting, and the share of steps that drafted."""
        tokens = seconds = drafted = 0.0
        for _ in range(steps):
            brought, took = float(requests), float(self.rng.uniform(0.95, 1.05))
            if gate.drafts(requests):
                brought += (self.rng.uniform(size=(requests, GAMMA)) < self.kept).cumprod(-1).sum()
                took, drafted = took * self.cost, drafted + 1
            gate.record(requests, brought, took)
            tokens, seconds = tokens + brought, seconds + took
        return tokens / seconds / requests, drafted / steps


def test_what_is_said_of_a_gate_is_what_it_does_and_measured() -> None:
    """A drafter that brings two tokens for the time of four: it rests, and both speeds are told."""
    gate, world = Gate(), World(kept=0.5, cost=4.0)
    assert gate.state is None
    world.run(gate, requests=4, steps=400)
    state = gate.state
    assert state is not None and state.drafting == gate.drafts(4)
    assert state.without_drafts == pytest.approx(4.0, rel=0.05)
    assert state.with_drafts == pytest.approx(4.0 * world.ratio(), rel=0.25) and world.ratio() < 0.6


@pytest.mark.parametrize("requests", [1, 7, 64])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.7])
def test_where_drafting_does_not_pay_it_costs_a_percent_at_most(kept: float, requests: int) -> None:
    gate, world = Gate(), World(kept, 4.5)
    assert world.ratio() < 0.8
    world.run(gate, requests, 200)  # both ways become known
    speed, share = world.run(gate, requests, 20_000)
    assert speed > 0.99
    assert 0 < share < 0.01, "it is tried again, and seldom"


@pytest.mark.parametrize("requests", [1, 7, 64])
@pytest.mark.parametrize("kept", [0.8, 0.9])
def test_where_drafting_pays_it_is_used_but_for_a_percent(kept: float, requests: int) -> None:
    gate, world = Gate(), World(kept, 2.0)
    assert world.ratio() > 1.5
    speed, share = world.run(gate, requests, 5000)
    assert speed > 0.97 * world.ratio()
    assert 0.95 < share < 1, "not drafting is tried again, and seldom"


def test_near_equality_costs_little_either_way() -> None:
    for kept in (0.60, 0.64, 0.68, 0.72, 0.76):
        worlds = [World(kept, 2.6, seed) for seed in range(4)]
        speeds = [world.run(Gate(), 1, 8000)[0] for world in worlds]
        assert np.mean(speeds) > 0.93 * max(1.0, worlds[0].ratio())


def test_a_change_of_what_is_asked_is_found_out() -> None:
    gate, dull, easy = Gate(), World(0.3, 4.0), World(0.95, 4.0)
    for world, least in ((dull, 0.97), (easy, 1.3), (dull, 0.93), (easy, 1.3)):
        assert world.run(gate, 1, 12_000)[0] > least


def test_each_load_learns_by_itself() -> None:
    gate = Gate()
    World(0.95, 2.0).run(gate, 1, 500)
    World(0.1, 4.0).run(gate, 16, 500)
    assert gate.drafts(1) and not gate.drafts(16) and not gate.drafts(31)
    assert not gate.drafts(200), "a load that is new begins as the nearest that is known"


def test_asking_changes_nothing() -> None:
    gate = Gate()
    World(0.5, 4.0).run(gate, 1, 300)
    before = pickle.dumps(gate)
    for requests in range(1, 100):
        gate.drafts(requests)
    assert pickle.dumps(gate) == before


def probes(gate: Gate, drafting: Callable[[int], tuple[float, float]], steps: int) -> list[int]:
    """The steps at which drafting began, where not drafting brings 1 in 1."""
    began, before = [], False
    for step in range(steps):
        now = gate.drafts(1)
        began += [step] * (now and not before)
        gate.record(1, *(drafting(step) if now else (1.0, 1.0)))
        before = now
    return began


def test_pauses_double_while_probes_lose_and_are_at_least_what_a_probe_costs() -> None:
    # each step of a probe loses a hundredth of one
    cheap = np.diff(probes(Gate(), lambda _: (0.99, 1.0), 30_000))
    assert 2 * FIRST_PAUSE < cheap[0] < 6 * FIRST_PAUSE
    np.testing.assert_allclose(cheap[2:5] / cheap[1:4], 2, rtol=0.1)
    dear = np.diff(probes(Gate(), lambda _: (1.0, 3.0), 20_000))
    assert dear[1] >= PROBE * 2 / MOST_LOST


def test_a_machine_that_others_slow_down_changes_nothing_for_long() -> None:
    """Both ways take twice as long from some moment on; the old mean of the other way then looks too good,
    once."""
    gate, rng, drafted = Gate(), np.random.default_rng(0), 0
    for step in range(6000):
        slow, drafts = 1.0 + (step > 3000), gate.drafts(1)
        drafted += drafts and step > 3000 + MEMORY
        gate.record(1, *((2.4, 4.0 * slow) if drafts else (1.0, slow * rng.uniform(0.95, 1.05))))
    assert drafted <= 3 * PROBE

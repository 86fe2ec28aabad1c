"""Whether to draft: the account bounds what a drafter may cost, whatever it promises and whatever a step was said to cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from draftkit.schedule.account import ALLOWANCE, AS_SAID, MOST_KEPT, RECENT, TAX, Account
from draftkit.schedule.planner import admit
from draftkit.schedule.speculation import FIRST_MEASURE, HOPELESS_REST, KEPT, LONGEST_REST, Speculation
from draftkit.schedule.step_rate import StepRate

GAMMA = 4
SAID = StepRate((1, 1000), (1.0, 1.5), (1, 64), (0.3, 0.4))


@dataclass
class World:
    """Requests for ever: proposals say `promised` and are kept with chance `kept` per token; drafting steps take `dear`
    times as long as said, all steps `slow` times; the first one behind them takes 1 + `cold` times as long, and each further
    one 0.85 of what that was too much."""

    promised: float
    kept: float
    dear: float = 1.0
    slow: float = 1.0
    seed: int = 0
    cold: float = 0.0

    def run(self, speculation: Speculation, requests: int, steps: int) -> tuple[float, float]:
        """Tokens per second over those without a drafter, and the share of steps that drafted."""
        rng, slots = np.random.default_rng(self.seed), np.arange(requests)
        plain = self.slow * float(SAID.target_seconds(np.array([requests]))[0])
        tokens = seconds = 0.0
        drafted, cold = 0, 0.0
        for _ in range(steps):
            budget = speculation.budget(slots)
            gained, verified, took = requests, 0, plain * rng.uniform(0.95, 1.05) * (1 + cold)
            cold = self.cold if budget else 0.85 * cold
            if budget:
                survival_RG = self.promised ** np.arange(1, GAMMA + 1) * np.ones((requests, 1))
                lengths_R = admit(survival_RG, budget)
                speculation.push(slots, survival_RG)
                fate_RG = (rng.uniform(size=(requests, GAMMA)) < self.kept).cumprod(-1)
                verified = int(lengths_R.sum())
                gained += int((fate_RG * (np.arange(GAMMA) < lengths_R[:, None])).sum())
                took = float(SAID.step_seconds(requests, np.array([requests + verified]))[0]) * self.slow * self.dear
                drafted += 1
            speculation.record(requests, budget > 0, verified, gained, took)
            tokens, seconds = tokens + gained, seconds + took
        return tokens / seconds / (requests / plain), drafted / steps


@pytest.mark.parametrize("requests", [1, 7, 64])
@pytest.mark.parametrize(
    "world", [World(0.9, 0.0), World(0.9, 0.3, dear=2.0), World(0.9, 0.9, dear=6.0)], ids=["liar", "slow", "very slow"]
)
def test_a_drafter_that_does_not_pay_costs_little_and_ever_less(world: World, requests: int) -> None:
    speculation = Speculation(64, GAMMA, SAID)
    early, _ = world.run(speculation, requests, 3000)
    late, share = world.run(speculation, requests, 20_000)
    unknown = (FIRST_MEASURE + AS_SAID + 1) * 1.5 * (world.dear - 1)  # lost before that was measured
    assert early > 1 - (ALLOWANCE + 8 + unknown) / 3000 - TAX
    assert late > 0.99
    assert share < 0.02


def test_requests_to_which_a_drafter_is_worth_much_are_told_from_others() -> None:
    """One of three answers is easy. Each gets a look when it begins, for what the easy ones bring."""
    speculation = Speculation(1, GAMMA, SAID)
    seconds = {True: 0.0, False: 0.0}
    for number in range(120):
        easy = number % 3 == 0
        chance = 0.95 if easy else 0.15
        speed, share = World(chance, chance, seed=number).run(speculation, 1, 60)
        speculation.forget(np.array([0]))
        seconds[easy] += 1 / speed
        if number > 30:
            assert share > 0.9 if easy else share < 0.5
    assert 40 / seconds[True] > 2.5 and 80 / seconds[False] > 0.97
    assert 120 / sum(seconds.values()) > 1.2


def test_what_easy_answers_bring_pays_for_looking_at_all_others() -> None:
    """One answer in three is easy, and a look at another one costs what drafting leaves behind as well. What is gained with an
    easy one pays for more than two looks, so none of the easy ones is missed after the beginning."""
    speculation, rng = Speculation(1, GAMMA, SAID), np.random.default_rng(0)
    seconds, missed = 0.0, 0
    for number, easy in enumerate(rng.uniform(size=600) < 1 / 3):
        chance = 0.97 if easy else 0.1
        speed, share = World(chance, chance, dear=1.5, seed=number, cold=0.7).run(speculation, 1, 60)
        speculation.forget(np.array([0]))
        if number >= 200:
            seconds, missed = seconds + 1 / speed, missed + (easy and share < 0.9)
    assert missed < 8
    assert 400 / seconds > 1.1


def test_an_account_pays_from_what_was_gained_first() -> None:
    account = Account()
    account.book(5.0)
    account.book(-7.0)
    assert (account.fund, account.credit) == (0.0, ALLOWANCE - 2)
    for _ in range(100):
        account.rest()
    assert account.credit == pytest.approx(ALLOWANCE - 2 + 100 * TAX)
    for _ in range(100):
        account.book(10.0)
    assert account.fund == MOST_KEPT


def test_many_requests_to_which_it_is_worth_nothing_cost_no_more_than_one() -> None:
    speculation = Speculation(1, GAMMA, SAID)
    speeds = []
    for number in range(200):
        speeds.append(World(0.15, 0.15, seed=number).run(speculation, 1, 60)[0])
        speculation.forget(np.array([0]))
    assert len(speeds) / sum(1 / speed for speed in speeds) > 1 - ALLOWANCE / (200 * 60) - TAX - 0.002


@pytest.mark.parametrize("slow", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("requests", [1, 64])
def test_a_drafter_that_pays_is_used_however_the_unit_of_time_was_measured(requests: int, slow: float) -> None:
    speed, share = World(0.8, 0.8, slow=slow).run(Speculation(64, GAMMA, SAID), requests, 4000)
    assert share > 0.98
    assert speed > 1.6


def test_a_drafter_that_is_better_than_it_says_is_not_held_to_its_word() -> None:
    """What it says decides about trials only; here the step rate was wrong, and drafting is measured to be cheap."""
    speed, share = World(0.45, 0.45, dear=0.6).run(Speculation(1, GAMMA, SAID), 1, 4000)
    assert share > 0.9 and speed > 1.2


def test_a_machine_that_becomes_faster_does_not_make_drafting_look_dear() -> None:
    """Steps that drafted are held against steps without of the same time: others may have used the machine then."""
    speculation = Speculation(1, GAMMA, SAID)
    for number in range(2):
        World(0.15, 0.15, slow=3.0, seed=number).run(speculation, 1, 60)
        speculation.forget(np.array([0]))
    World(0.15, 0.15).run(speculation, 1, 100)
    speculation.forget(np.array([0]))
    speed, share = World(0.95, 0.95).run(speculation, 1, 200)
    assert share > 0.9 and speed > 2


def test_a_look_verifies_no_more_than_pays_at_once() -> None:
    """What the first proposals of a request promise is not known before; without a past all might be accepted."""
    speculation, slots = Speculation(1, GAMMA, SAID), np.arange(1)
    budget = speculation.budget(slots)
    assert speculation.lengths(np.full((1, GAMMA), 1e-5), budget).tolist() == [0]
    assert speculation.lengths(np.full((1, GAMMA), 0.99), budget).tolist() == [GAMMA]
    speculation.push(slots, np.full((1, GAMMA), 0.99))
    speculation.record(1, True, GAMMA, 1 + GAMMA, 1.8)
    budget = speculation.budget(slots)
    assert speculation.lengths(np.full((1, GAMMA), 1e-5), budget).tolist() == [GAMMA]  # from then on older ones say


def test_a_change_for_the_worse_is_noticed_and_one_for_the_better_too() -> None:
    speculation = Speculation(64, GAMMA, SAID)
    World(0.9, 0.9).run(speculation, 8, 1000)
    speed, share = World(0.9, 0.0).run(speculation, 8, 4000)
    assert speed > 1 - (MOST_KEPT + KEPT + ALLOWANCE + 8) / 4000 - TAX and share < 0.15
    World(0.9, 0.9).run(speculation, 8, 2 * LONGEST_REST)  # at most one longest rest lies before the next trial
    _, share = World(0.9, 0.9).run(speculation, 8, 1000)
    assert share > 0.95


def test_where_no_luck_would_help_not_even_a_trial_is_made_for_a_long_time() -> None:
    dear = StepRate((1, 1000), (1.0, 1000.0), (1,), (0.0,))  # every token costs as much as a pass
    speculation, slots = Speculation(64, GAMMA, dear, np.full(GAMMA, 0.3)), np.arange(64)
    budgets = []
    for _ in range(HOPELESS_REST + 3):
        budgets.append(speculation.budget(slots))
        speculation.record(64, budgets[-1] > 0, budgets[-1], 64, 64.0)
    assert not any(budgets[:HOPELESS_REST]) and any(budgets)


def test_loads_do_not_share_their_accounts() -> None:
    """What does not pay for many may pay for one: nothing that was measured with many closes the door for one."""
    speculation = Speculation(64, GAMMA, SAID)
    World(0.9, 0.0).run(speculation, 64, 2000)
    _, share = World(0.9, 0.9).run(speculation, 1, 2000)
    assert share > 0.9


def test_decisions_follow_from_earlier_steps_alone() -> None:
    """The same past gives the same budgets, whatever this step's proposals will say."""
    first, second = (Speculation(4, GAMMA, SAID) for _ in range(2))
    rng, slots = np.random.default_rng(0), np.arange(4)
    for _ in range(400):
        survivals = [rng.uniform(size=(4, GAMMA)).cumprod(-1) for _ in range(2)]
        budgets = [s.budget(slots) for s in (first, second)]
        assert budgets[0] == budgets[1]
        if budgets[0]:
            first.push(slots, survivals[0])
            second.push(slots, survivals[0])
        tokens, seconds = int(rng.integers(4, 12)), float(rng.uniform(0.8, 3))
        for one in (first, second):
            one.record(4, budgets[0] > 0, budgets[0], tokens, seconds)


def test_those_who_cannot_draft_wait_for_those_who_do_and_count() -> None:
    """Drafting for one triples its tokens in steps that take 1.8 times as long: worth it alone, not beside seven others."""

    def share(others: int) -> float:
        speculation, slots = Speculation(8, GAMMA, StepRate((1, 1000), (1.0, 1.0), (1,), (0.8,))), np.arange(1)
        drafted = 0
        for _ in range(2000):
            budget = speculation.budget(slots, others)
            if budget:
                speculation.push(slots, np.array([[0.95, 0.9, 0.1, 0.0]]))
            tokens, seconds = (3, 1.8) if budget else (1, 1.0)
            speculation.record(1 + others, budget > 0, budget, tokens + others, seconds)
            drafted += budget > 0
        return drafted / 2000

    assert share(0) > 0.95
    assert share(7) < 0.02


def test_what_a_step_takes_right_behind_a_prompt_is_not_what_drafting_saves() -> None:
    """One that reads alone takes up to twice as long then; among many a prompt changes little."""
    for requests, slow in ((1, 3.0), (64, 1.0)):
        speculation = Speculation(64, GAMMA, SAID)
        plain = float(SAID.target_seconds(np.array([requests]))[0])
        for step in range(206):
            if step % 20 == 0:
                speculation.disturb()
            speculation.rest(requests, listening=False)
            speculation.record(requests, False, 0, requests, plain * (slow if step % 20 < 6 else 1.0))
        (load,) = speculation._loads.values()
        assert len(load.costs.plain) == RECENT and set(load.costs.plain) == {1.0}


def test_steps_behind_drafting_at_another_load_are_not_settled_either() -> None:
    speculation, drafted = Speculation(2, GAMMA, SAID), 0
    for number in range(100):
        if number % 10:
            speculation.rest(1, listening=False)
            speculation.record(1, False, 0, 1, 3.0)
        else:
            budget = speculation.budget(np.arange(2))
            speculation.push(np.arange(2), np.full((2, GAMMA), 0.9).cumprod(-1))
            speculation.record(2, budget > 0, budget, 8, 1.4)
            drafted += budget > 0
    assert drafted == 10
    assert not speculation._loads[1].costs.plain  # drafting with two was never far enough away


def test_listening_is_charged_by_the_time_it_takes() -> None:
    """Microseconds: much of a small model's step on a CPU, nothing of a large one's on a GPU."""
    for plain, least, most in ((0.35e-3, 4.0, 6.0), (10e-3, 0.0, 0.2)):
        speculation = Speculation(1, GAMMA, StepRate((1, 8), (plain, 2 * plain), (1,), (plain,)))
        for _ in range(50):
            speculation.rest(1, listening=True)
        (load,) = speculation._loads.values()
        assert least <= ALLOWANCE - load.account.credit <= most


def test_what_a_step_that_drafted_leaves_behind_is_charged_where_it_drafted() -> None:
    """Two requests draft, one of them ends, and the other's first steps alone take half as long again."""
    speculation = Speculation(2, GAMMA, SAID)
    for requests in (2, 1):
        World(0.1, 0.1, dear=2).run(speculation, requests, 100)
    alone, together = (speculation._loads[requests.bit_length()] for requests in (1, 2))
    assert alone.resting > 6
    together.resting = together.failures = 0
    before = alone.account.credit, together.account.credit, alone.resting
    assert speculation.budget(np.arange(2))
    speculation.forget(np.arange(1, 2))
    for _ in range(6):
        speculation.rest(1, listening=True)
        speculation.record(1, False, 0, 1, 1.5)
    assert together.gain < -2.5 or together.account.credit < before[1] - 2.5
    assert alone.account.credit > before[0] - 0.1 and alone.resting == before[2] - 6


def test_a_server_that_has_failed_for_weeks_goes_on() -> None:
    """Every failure doubles the next rest; after a thousand of them that is no number any more."""
    load = Speculation(1, GAMMA, SAID)._load(1)
    for _ in range(3000):
        load.gain = -0.01
        load.stop()
    assert load.failures == 3000 and 0 < load.resting <= LONGEST_REST

"""A serving simulator: recorded traces, a step-rate table, a load, and an arm that decides how much to
verify.

One step is what the engine does: all running requests draft, one target pass verifies what the arm chose,
every request advances by its accepted tokens + 1. Time comes from the step rate; a proposal yields what the
trace says. Prefill, transport and memory limits are left out, for all arms alike.

Shapes: R running requests, S slots, N trace rows, G = gamma drafted positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from draftkit.errors import ScheduleError
from draftkit.schedule.calibration import Calibration
from draftkit.schedule.estimator import AcceptanceEstimator
from draftkit.schedule.gate import Gate
from draftkit.schedule.planner import BudgetPlanner, admit, budget_from, plan_verification, survival_of
from draftkit.schedule.step_rate import Floats, Ints, StepRate
from draftkit.schedule.step_rate_table import StepRateTable
from draftkit.schedule.traces import Traces


@dataclass(frozen=True)
class Load:
    """`requests` answers in all; at most `concurrency` run at once. Without a rate they wait from the
    beginning (a closed loop), with one they arrive at random, `rate` per second on average (Poisson)."""

    requests: int
    concurrency: int
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1 or self.concurrency < 1 or (self.rate is not None and not self.rate > 0):
            rate = "" if self.rate is None else f", {self.rate:g} per second"
            told = f"{self.requests} requests, {self.concurrency} at once{rate}"
            raise ScheduleError(f"a load of {told}: requests, concurrency and rate must be above 0")
        if not 0 <= self.seed < 2**63:
            raise ScheduleError(f"a load's seed {self.seed}: must be 0 or more and below 2^63")


@dataclass(frozen=True)
class Outcome:
    """What a simulated load measured. Speeds are tokens per second; `verified_mean` drafted tokens verified
    per request and step; `user_speed` the median over requests of tokens per second between start and end;
    `running_mean` requests."""

    arm: str
    concurrency: int
    rate: float | None
    tokens: int
    seconds: float
    throughput: float
    user_speed: float
    accepted_len: float
    verified_mean: float
    running_mean: float
    drafting_share: float  # of steps
    queue_median_s: float


@dataclass(frozen=True)
class Batch:
    """What an arm may look at. `kept_R` is for the oracle alone."""

    slots_R: Ints
    survival_RG: Floats
    kept_R: Ints
    usable_R: Ints
    step_rate: StepRate


@dataclass(frozen=True)
class Decision:
    """Drafted tokens to verify per request [R], and whether the drafter runs in this step."""

    lengths_R: Ints
    drafting: bool


Arm = Callable[[Batch, Gate, BudgetPlanner], Decision]


def fixed_arm(length: int) -> Arm:
    """The first `length` drafted tokens of every request; 0 is no speculation, 1 resembles a one-token MTP
    module (at the cost of this drafter)."""

    def decide(batch: Batch, gate: Gate, planner: BudgetPlanner) -> Decision:
        return Decision(np.minimum(batch.usable_R, length), length > 0)

    return decide


def algorithm_1_arm(batch: Batch, gate: Gate, planner: BudgetPlanner) -> Decision:
    """Where the gate says to draft: early stop on this step's survivals."""
    if not gate.drafts(len(batch.slots_R)):
        return _plain(batch)
    return Decision(plan_verification(batch.survival_RG, batch.step_rate), True)


def budget_arm(batch: Batch, gate: Gate, planner: BudgetPlanner) -> Decision:
    """The production variant, as the engine runs it: the budget from the survivals of the step before, ranked
    by this step's."""
    if not gate.drafts(len(batch.slots_R)):
        return _plain(batch)
    return Decision(planner.plan(batch.slots_R, batch.survival_RG), True)


def oracle_arm(batch: Batch, gate: Gate, planner: BudgetPlanner) -> Decision:
    """Knows what will be accepted, and verifies nothing else: no planner can do better in a step."""
    survival_RG = (np.arange(batch.survival_RG.shape[1]) < batch.kept_R[:, None]).astype(np.float64)
    requests, step_rate = len(survival_RG), batch.step_rate
    lengths_R = admit(survival_RG, budget_from(survival_RG, step_rate))
    passes = step_rate.target_seconds(np.array([requests, requests + lengths_R.sum()]))
    drafted = (requests + lengths_R.sum()) / (passes[1] + step_rate.drafter_seconds(requests))
    return Decision(lengths_R, True) if drafted > requests / passes[0] else _plain(batch)


def arms_for(gamma: int) -> dict[str, Arm]:
    """The arms of the paper's comparison, by name."""
    fixed = {f"fixed {length}": fixed_arm(length) for length in range(2, gamma + 1)}
    ends = {"algorithm 1": algorithm_1_arm, "budget": budget_arm, "oracle": oracle_arm}
    return {"no speculation": fixed_arm(0), "one token": fixed_arm(1), **fixed, **ends}


def simulate(
    traces: Traces,
    table: StepRateTable,
    load: Load,
    name: str,
    arm: Arm,
    calibration: Calibration | None = None,
) -> Outcome:
    """Run a load to its end. Confidences are calibrated if a calibration is given; a drafter without a
    confidence head gets the online estimator. Every request replays a traced prompt, drawn with the load's
    seed."""
    run = _Run(traces, table, load, arm, calibration)
    while run.waiting or len(run.slots):
        run.admit_arrived()
        run.step()
    return run.outcome(name)


class _Run:
    """The state of one simulation; slots are fixed places, `slots` the running ones in order of arrival."""

    def __init__(
        self, traces: Traces, table: StepRateTable, load: Load, arm: Arm, calibration: Calibration | None
    ) -> None:
        rng = np.random.default_rng(load.seed)
        self.traces, self.load, self.arm, self.calibration = traces, load, arm, calibration
        prompts = rng.integers(0, len(traces.prompts), load.requests)
        gaps = rng.exponential(1 / load.rate, load.requests) if load.rate else np.zeros(load.requests)
        self.waiting = deque(zip(prompts.tolist(), gaps.cumsum().tolist(), strict=True))
        contexts = [p.prompt_tokens + p.rows / 2 for p in traces.prompts]
        self.step_rate = table.at(float(np.mean(contexts)))
        self.estimator = None if traces.has_confidence else AcceptanceEstimator(traces.gamma)
        self.slots = np.zeros(0, np.int64)
        slots = min(load.concurrency, load.requests)
        self.free = list(range(slots))[::-1]
        self.row_S, self.end_S, self.length_S = (np.zeros(slots, np.int64) for _ in range(3))
        self.began_S = np.zeros(slots)
        self.now = self.full_until = 0.0
        self.tokens = self.full_tokens = self.steps = self.request_steps = self.verified = self.drafting = 0
        self.speeds: list[float] = []
        self.queued: list[float] = []
        self.draft_max_NG = traces.draft_max_NG.astype(np.float64)
        self.survival_NG = self._survivals() if self.estimator is None else np.zeros((0, traces.gamma))
        prior_G = self.survival_NG.mean(0) if self.estimator is None else None
        self.gate, self.planner = Gate(), BudgetPlanner(slots, traces.gamma, self.step_rate, prior_G)

    def _survivals(self) -> Floats:
        confidence_NG = self.traces.confidence_NG.astype(np.float64)
        if self.calibration is not None:
            confidence_NG = self.calibration.apply(confidence_NG)
        position = np.arange(self.traces.gamma)
        return np.where(position < self.traces.usable_N[:, None], survival_of(confidence_NG), 0.0)

    def admit_arrived(self) -> None:
        """Start waiting requests while there is room; when nothing runs, time goes on to the next arrival."""
        if not len(self.slots) and self.waiting:
            self.now = max(self.now, self.waiting[0][1])
        while self.waiting and self.free and self.waiting[0][1] <= self.now:
            prompt, arrived = self.waiting.popleft()
            slot, traced = self.free.pop(), self.traces.prompts[prompt]
            self.row_S[slot], self.end_S[slot] = traced.first, traced.first + traced.rows
            self.length_S[slot], self.began_S[slot] = traced.rows, self.now
            self.slots = np.append(self.slots, slot)
            self.queued.append(self.now - arrived)

    def step(self) -> None:
        """One step of all running requests."""
        slots = self.slots
        rows = self.row_S[slots]
        usable, kept = self.traces.usable_N[rows], self.traces.accepted_N[rows]
        batch = Batch(slots, self._estimate(rows, usable), kept, usable, self.step_rate)
        decision = self.arm(batch, self.gate, self.planner)
        lengths = np.minimum(decision.lengths_R, usable)
        passed = np.array([len(slots) + int(lengths.sum())])
        seconds = float(self.step_rate.target_seconds(passed)[0])
        if decision.drafting:
            seconds += self.step_rate.drafter_seconds(len(slots))
        accepted = np.minimum(kept, lengths)
        if self.estimator is not None:
            self.estimator.observe(self.draft_max_NG[rows], accepted, lengths)
        gained = np.minimum(accepted + 1, self.end_S[slots] - rows)
        self.gate.record(len(slots), int(gained.sum()), seconds)
        self.now += seconds
        self.tokens += int(gained.sum())
        self.steps += 1
        self.request_steps += len(slots)
        self.verified += int(lengths.sum())
        self.drafting += decision.drafting
        if self.waiting:  # the last requests run in an emptying batch, which says nothing about the load
            self.full_until, self.full_tokens = self.now, self.tokens
        self.row_S[slots] = rows + gained
        self._finish(slots[self.row_S[slots] >= self.end_S[slots]])

    def _estimate(self, rows: Ints, usable: Ints) -> Floats:
        if self.estimator is None:
            return self.survival_NG[rows]
        confidence_RG = self.estimator.confidence(self.draft_max_NG[rows])
        return np.where(np.arange(self.traces.gamma) < usable[:, None], survival_of(confidence_RG), 0.0)

    def _finish(self, done: Ints) -> None:
        if not len(done):
            return
        self.speeds += (self.length_S[done] / (self.now - self.began_S[done])).tolist()
        self.planner.forget(done)
        self.free += done.tolist()
        self.slots = self.slots[~np.isin(self.slots, done)]

    def outcome(self, name: str) -> Outcome:
        """Throughput counts the time while requests were waiting; all else counts all requests."""
        tokens, seconds = (self.full_tokens, self.full_until) if self.full_tokens else (self.tokens, self.now)
        return Outcome(
            arm=name,
            concurrency=self.load.concurrency,
            rate=self.load.rate,
            tokens=self.tokens,
            seconds=self.now,
            throughput=tokens / seconds,
            user_speed=float(np.median(self.speeds)),
            accepted_len=self.tokens / self.request_steps,
            verified_mean=self.verified / self.request_steps,
            running_mean=self.request_steps / self.steps,
            drafting_share=self.drafting / self.steps,
            queue_median_s=float(np.median(self.queued)),
        )


def _plain(batch: Batch) -> Decision:
    return Decision(np.zeros(len(batch.slots_R), np.int64), False)


def parametric_table(
    free_tokens: int, tile: int, gamma_cost: float = 0.1, seconds: float = 0.01
) -> StepRateTable:
    """A step rate from two numbers of a machine: a pass takes `seconds` until arithmetic takes as long as
    reading the weights, at `free_tokens` tokens, and grows in proportion from there; passes are padded to
    multiples of `tile`, which makes the jagged steps of real curves. Drafting takes `gamma_cost` of a pass of
    one token per request."""
    sizes = tuple(range(1, tile)) if tile <= 4 else ()
    sizes = tuple(sorted({*sizes, *range(tile, max(8 * free_tokens, 4096) + tile, tile)}))
    passes = tuple(seconds * max(1.0, n / free_tokens) for n in sizes)
    requests = sizes[:: max(1, len(sizes) // 64)]
    drafts = tuple(gamma_cost * seconds * max(1.0, n / free_tokens) for n in requests)
    return StepRateTable((0,), sizes, (passes,), requests, drafts, interpolation="staircase")

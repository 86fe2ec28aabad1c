"""How many drafted tokens of each request go into the next target pass.

What a plan may look at decides whether the output keeps the target distribution: the admission of a drafted
token may depend on nothing that was learned from that token or from later ones of its request. Every plan
here can be read as a walk that knows the admitted tokens only: the confidence of position k was computed
before x_k was drawn, survivals fall along a request, so the next candidate of a request depends on its
admitted tokens alone. (`evaluate/exactness.py` proves it by enumeration.) A search over all budgets that uses
the survivals of the same step is not such a walk: see `budget_from`.

Equal survivals are ordered by position, then by request: never by token value, and a request's prefix stays
contiguous.

Shapes: R requests that draft, G = gamma drafted positions. Positions that were not drafted have survival 0
and are never admitted. `others` requests may be in the same pass without drafting: each is one token of it
and gets one token.
"""

from __future__ import annotations

import numpy as np

from draftkit.schedule.step_rate import Floats, Ints, StepRate

MEMORY = 0.05  # weight of one step in the running mean of survivals


def survival_of(confidence_RG: Floats) -> Floats:
    """Probability that a whole prefix is accepted, a_{r,j} = prod_{i <= j} c_{r,i}: float64 [R, G], falling
    in j.

    Confidences are cut to [0, 1]; NaN counts as zero.
    """
    return np.nan_to_num(np.asarray(confidence_RG, np.float64)).clip(0.0, 1.0).cumprod(-1)


def plan_verification(survival_RG: Floats, step_rate: StepRate, others: int = 0) -> Ints:
    """Lengths [R] by Algorithm 1 of the DSpark paper: admit by falling survival while the estimate of
    tokens per second

        Theta(B) = (R + others + sum of admitted survivals) / (seconds of a pass of B tokens + seconds of
          drafting)

    rises, and stop at the first token that does not raise it. The early stop keeps it lossless. The
    drafter has run when this is asked, so its time is in every Theta, that of length zero too: the plan is
    never worse than verifying nothing. Whether to draft at all is decided before (`gate.py`).
    """
    order_N, gain_N = _by_survival(survival_RG)
    theta = _rate(gain_N, len(survival_RG), others, step_rate)
    falls = np.flatnonzero(theta[1:] <= theta[:-1])
    admitted = int(falls[0]) if len(falls) else len(order_N)
    return _lengths(order_N[:admitted], len(survival_RG))


def budget_from(stale_survival_RG: Floats, step_rate: StepRate, others: int = 0) -> int:
    """The number K of drafted tokens that the pass of a step that drafts should hold, from survivals of
    EARLIER steps (the paper: two).

    The best Theta of all K, however jagged the step rate. Whether to draft at all is decided before
    (`gate.py`). With survivals of the same step the search would bias the output (Appendix A of the paper):
    the end of the search depends on tokens that it decides about.
    """
    _, gain_N = _by_survival(stale_survival_RG)
    return int(_rate(gain_N, len(stale_survival_RG), others, step_rate).argmax())


def admit(survival_RG: Floats, budget: int) -> Ints:
    """Lengths [R]: the `budget` largest survivals of this step. The budget must not come from this step's
    survivals."""
    order_N, _ = _by_survival(survival_RG)
    return _lengths(order_N[: max(budget, 0)], len(survival_RG))


def _by_survival(survival_RG: Floats) -> tuple[Ints, Floats]:
    """Requests of the candidates and their survivals, by falling survival, then position, then request: [N]
    each."""
    requests = len(survival_RG)
    by_position_N = np.asarray(survival_RG, np.float64).T.ravel()
    order_N = np.argsort(-by_position_N, kind="stable")
    gain_N = by_position_N[order_N]
    count = len(gain_N) - int(np.searchsorted(gain_N[::-1], 0.0, side="right"))
    return order_N[:count] % max(requests, 1), gain_N[:count]


def _rate(gain_N: Floats, drafting: int, others: int, step_rate: StepRate) -> Floats:
    """Theta of the first 0..N candidates, tokens per second [N + 1]."""
    requests = drafting + others
    tokens = np.full(len(gain_N) + 1, float(requests))
    tokens[1:] += gain_N.cumsum()
    passed_N = np.arange(requests, requests + len(tokens))
    rate: Floats = tokens / step_rate.step_seconds(drafting, passed_N)
    return rate


def _lengths(requests_N: Ints, requests: int) -> Ints:
    return np.bincount(requests_N, minlength=requests)


class BudgetPlanner:
    """The production variant over time: the survivals of a step's proposals make the budget of the next one.

    Per slot (a place below `slots` that a request keeps) the survivals of its last proposal, and their
    running mean for requests without a past. `prior_G` is the mean to begin with, as calibration measured it;
    without one the drafter is given every chance. The paper lets two steps lie between survivals and budget,
    because its budget is worked out while the step before runs; here steps do not overlap.
    """

    def __init__(self, slots: int, gamma: int, step_rate: StepRate, prior_G: Floats | None = None) -> None:
        self.step_rate = step_rate
        self._past_SG = np.full((slots, gamma), np.nan)
        self._mean_G = np.ones(gamma) if prior_G is None else np.array(prior_G, np.float64)
        self._weight = 1.0 if prior_G is None else MEMORY

    def plan(self, slots_R: Ints, survival_RG: Floats, others: int = 0) -> Ints:
        """Settle the lengths [R] of a step that drafts for these slots, and remember its survivals."""
        past_RG = self._past_SG[slots_R]
        stale_RG = np.where(np.isnan(past_RG), self._mean_G, past_RG)
        self._past_SG[slots_R] = survival_RG
        self._mean_G = (1 - self._weight) * self._mean_G + self._weight * survival_RG.mean(0)
        # a plain mean first, then a running one
        self._weight = max(MEMORY, self._weight / (1 + self._weight))
        return admit(survival_RG, budget_from(stale_RG, self.step_rate, others))

    def forget(self, slots_R: Ints) -> None:
        """The requests of these slots are gone."""
        self._past_SG[slots_R] = np.nan

"""Proof by enumeration that a verification rule, with a planner before it, leaves the target distribution as
it is.

On a tiny vocabulary every proposal, every plan, every verdict of up to three rounds of one or two requests is
summed over in float64. What comes out is the joint distribution of the first tokens of all requests, not an
estimate: it must be the product of the targets' own. The rules and planners are the functions that decoding
and the engine call; `exactness_cases.py` has what they are tried on.

Prefixes are nodes of a tree: the root is 0, the child of node n by token t is V n + 1 + t. A request ends at
depth L; what the last round leaves open is filled with the target's own continuation.

Shapes: V vocabulary, G = gamma drafted positions, N nodes, S active nodes (depth < L), E nodes up to depth L,
M = V^G proposals, K = V^(G-1) draft prefixes (all that a confidence may look at), O = V^L outputs, C
confidence patterns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftkit.evaluate.exactness_cases import (
    LEVELS,
    PlannerCase,
    Tables,
    first_of_depth,
    planner_cases,
    random_step_rate,
    random_tables,
)
from draftkit.ops.verify import RULES, DenseProposals, Rule, length_distribution
from draftkit.schedule.step_rate import Floats, Ints

DEVIATION_ALLOWED = 1e-12


def output_distribution(rule: Rule, case: PlannerCase, tables: Sequence[Tables], rounds: int) -> Floats:
    """Joint distribution of the first L tokens of each request, [O] * R."""
    return _output_distribution([_Round(rule, t) for t in tables], case, tables, rounds)


def deviation(distribution: Floats, tables: Sequence[Tables]) -> float:
    """Largest difference between a joint distribution and the product of the targets' own."""
    own = np.ones(())
    for table in tables:
        own = np.multiply.outer(own, _continuation(table)[0])
    return float(np.abs(distribution - own).max())


@dataclass(frozen=True)
class Finding:
    """The largest deviation over all tables of one rule after one planner."""

    rule: str
    planner: str
    requests: int
    gamma: int
    rounds: int
    deviation: float


def prove(
    requests: int,
    gamma: int,
    tables: int,
    vocab: int = 3,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Every rule after every planner, over random tables and step rates; `tick` is called after each table.

    One request: three rounds, L = gamma + 2, budgets two rounds old. Two requests that share a pass: two
    rounds, L = 3, budgets one round old (the harder case for staleness).
    """
    rounds, length, lag = (3, gamma + 2, 2) if requests == 1 else (2, 3, 1)
    rng = np.random.default_rng(seed)
    worst: dict[tuple[str, str], float] = {}
    for _ in range(tables):
        chosen = [random_tables(vocab, gamma, length, rng) for _ in range(requests)]
        cases = planner_cases(random_step_rate(requests * (gamma + 1), rng), gamma, lag)
        for rule in RULES.values():
            ready = [_Round(rule, t) for t in chosen]
            for case in cases:
                found = deviation(_output_distribution(ready, case, chosen, rounds), chosen)
                worst[rule.name, case.name] = max(found, worst.get((rule.name, case.name), 0.0))
        tick()
    return [
        Finding(rule, planner, requests, gamma, rounds, found) for (rule, planner), found in worst.items()
    ]


def _output_distribution(
    ready: Sequence[_Round], case: PlannerCase, tables: Sequence[Tables], rounds: int
) -> Floats:
    plans = _Plans(case, tables)
    start = np.zeros((len(ready[0].moves),) * len(tables))
    start.flat[0] = 1.0
    groups: dict[_Past, Floats] = {(): start}  # what is known of the last `lag` rounds -> mass per joint node
    for _ in range(rounds):
        following: dict[_Past, Floats] = {}
        for history, mass in groups.items():
            for shown, moved in _advance(mass, ready, plans, history):
                key = (*history, shown)[-case.lag :] if case.lag else ()
                following[key] = following[key] + moved if key in following else moved
        groups = following
    distribution: Floats = np.sum(list(groups.values()), axis=0)
    for axis, table in enumerate(tables):
        distribution = np.moveaxis(np.tensordot(distribution, _continuation(table), (axis, 0)), -1, axis)
    return distribution


# of a few rounds: the joint pattern of confidences, and the tokens of all requests
_Past = tuple[tuple[int, int], ...]


# --- one round of one request, for every node, draft prefix and length


class _Round:
    """`moves` [E, K, G + 1, E]: from a node with this draft prefix (probability of the prefix included) and
    this many verified tokens to the next node. `pattern` [E, K]: which confidences the planner sees. A
    finished request stays where it is, with draft prefix 0 and the pattern of an empty proposal."""

    def __init__(self, rule: Rule, tables: Tables) -> None:
        vocab, gamma, length = tables.vocab, tables.gamma, tables.length
        active, ends = first_of_depth(vocab, length), first_of_depth(vocab, length + 1)
        proposals_MG = np.array(list(itertools.product(range(vocab), repeat=gamma)))
        path = [np.repeat(np.arange(active)[:, None], len(proposals_MG), 1)]
        for k in range(gamma):
            path.append(path[-1] * vocab + 1 + proposals_MG[:, k])
        path_SMH = np.stack(path, -1)  # H = G + 1: the node before each position, and after the last
        q_SMGV = tables.draft_NGV[path_SMH[..., :gamma], np.arange(gamma)]
        chance_SM = np.take_along_axis(q_SMGV, proposals_MG[None, :, :, None], -1)[..., 0].prod(-1)
        prefixes = len(proposals_MG) // vocab
        prefix_M = np.arange(len(proposals_MG)) // vocab

        self.moves = np.zeros((ends, prefixes, gamma + 1, ends))
        rows = active * len(proposals_MG)
        tokens = torch.from_numpy(proposals_MG).repeat(active, 1)
        p = torch.from_numpy(tables.target_NV[path_SMH]).reshape(rows, gamma + 1, vocab)
        q = torch.from_numpy(q_SMGV).reshape(rows, gamma, vocab)
        source = np.repeat(np.arange(active), len(proposals_MG)) * prefixes + np.tile(prefix_M, active)
        for verified in range(gamma + 1):
            proposals = DenseProposals(tokens, p, q, torch.full((rows,), verified))
            lengths, weights = length_distribution(rule, proposals)
            distribution = lengths.numpy().reshape((*chance_SM.shape, gamma + 1))
            for accepted in range(verified + 1):
                place = torch.full((rows,), accepted)
                following = proposals.next_token_distribution(place, weights[:, accepted]).numpy()
                weight = (chance_SM * distribution[..., accepted]).reshape(rows, 1) * following
                child = path_SMH[..., accepted].reshape(rows, 1) * vocab + 1 + np.arange(vocab)
                cell = source[:, None] * ends + _ancestor(child, vocab, ends)
                moved = np.bincount(cell.ravel(), weight.ravel(), active * prefixes * ends)
                self.moves[:active, :, verified] += moved.reshape(active, prefixes, ends)
        finished = np.arange(active, ends)
        self.moves[finished, 0, :, finished] = 1.0

        self.pattern = np.full((ends, prefixes), LEVELS**gamma)
        shown_SMG = tables.level_NG[path_SMH[..., :gamma], np.arange(gamma)]
        digits = LEVELS ** np.arange(gamma)
        # the last token is unseen by any confidence
        self.pattern[:active] = (shown_SMG * digits).sum(-1)[:, ::vocab]
        # [E], tokens before each node
        self.depth = np.repeat(np.arange(length + 1), vocab ** np.arange(length + 1))


class _Plans:
    """Lengths [C, ..., R] for every pattern of confidences of all requests, asked once per budget."""

    def __init__(self, case: PlannerCase, tables: Sequence[Tables]) -> None:
        self.case, self.requests, gamma = case, len(tables), tables[0].gamma
        self.patterns = LEVELS**gamma + 1
        digits = np.arange(LEVELS**gamma)[:, None] // LEVELS ** np.arange(gamma) % LEVELS
        rows = [np.concatenate([t.levels[digits], np.zeros((1, gamma))]) for t in tables]
        self.confidence = [
            np.stack([rows[r][i] for r, i in enumerate(c)])
            for c in itertools.product(range(self.patterns), repeat=self.requests)
        ]
        self.unknown = np.ones((self.requests, gamma))
        self._known: dict[int, Ints] = {}

    def lengths(self, history: _Past) -> Ints:
        """For what is known of the last rounds."""
        budget = 0
        if self.case.budget is not None:
            pattern, tokens = history[0] if len(history) == self.case.lag else (None, 0)
            budget = self.case.budget(self.unknown if pattern is None else self.confidence[pattern], tokens)
        if budget not in self._known:
            self._known[budget] = np.array([self.case.lengths(c, budget) for c in self.confidence])
        return self._known[budget]


def _advance(
    mass: Floats, rounds: Sequence[_Round], plans: _Plans, history: _Past
) -> list[tuple[tuple[int, int], Floats]]:
    """One round from the joint nodes: what it shows (joint pattern, tokens) and the mass per joint node after
    it; what the planner does not look at is 0."""
    lengths_CR = plans.lengths(history)
    places = np.nonzero(mass)
    prefixes = rounds[0].pattern.shape[1]
    choices = np.array(list(itertools.product(range(prefixes), repeat=len(rounds)))).T  # [R, K^R]
    nodes = [np.repeat(n, choices.shape[1]) for n in places]
    chosen = [np.tile(c, len(places[0])) for c in choices]
    pattern = np.zeros_like(nodes[0])
    for one, n, k in zip(rounds, nodes, chosen, strict=True):
        pattern = pattern * plans.patterns + one.pattern[n, k]
    weight = np.repeat(mass[places], choices.shape[1])
    moved = [
        one.moves[n, k, lengths_CR[pattern, r]]
        for r, (one, n, k) in enumerate(zip(rounds, nodes, chosen, strict=True))
    ]
    moved[0] = moved[0] * weight[:, None]
    shown = pattern if plans.case.lag else np.zeros_like(pattern)
    before = sum(one.depth[n] for one, n in zip(rounds, nodes, strict=True)) * plans.case.counts
    after = rounds[0].depth if len(rounds) == 1 else rounds[0].depth[:, None] + rounds[1].depth
    found = []
    for one_pattern, depth in np.unique(np.stack([shown, before]), axis=1).T:
        rows = (shown == one_pattern) & (before == depth)
        joint = moved[0][rows].T @ moved[1][rows] if len(moved) > 1 else moved[0][rows].sum(0)
        if not plans.case.counts:
            found.append(((int(one_pattern), 0), joint))
            continue
        for tokens in range(int(after.max() - depth) + 1):
            brought = np.where(after - depth == tokens, joint, 0.0)
            if brought.any():
                found.append(((int(one_pattern), tokens), brought))
    return found


def _continuation(tables: Tables) -> Floats:
    """Probability [E, O] that the target goes on from a node to a whole output; 0 for outputs that do not
    begin so."""
    vocab, length = tables.vocab, tables.length
    leaves = np.arange(vocab**length)
    chance = np.zeros((first_of_depth(vocab, length + 1), len(leaves)))
    node = leaves + first_of_depth(vocab, length)
    along = np.ones(len(leaves))
    chance[node, leaves] = along
    for _ in range(length):
        parent, token = (node - 1) // vocab, (node - 1) % vocab
        along = along * tables.target_NV[parent, token]
        chance[parent, leaves] = along
        node = parent
    return chance


def _ancestor(node: Ints, vocab: int, ends: int) -> Ints:
    """The node itself, or where its path leaves the compared output."""
    while (node >= ends).any():
        node = np.where(node >= ends, (node - 1) // vocab, node)
    return node

"""Proof by enumeration that a verification rule leaves the target's distribution as it is.

On a tiny vocabulary every proposal and every verdict is summed over, in float64, with random distributions for target and
drafter behind every prefix. What comes out is the exact law of the output, not an estimate.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from draftkit.ops.verify import Rule

Tree = dict[tuple[int, ...], Tensor]  # prefix -> next-token distribution, float64 [V]


def random_tree(vocab: int, depth: int, generator: torch.Generator, sharpness: float = 2.0) -> Tree:
    """A random next-token distribution for every prefix shorter than `depth`."""
    tree = {}
    for length in range(depth):
        for prefix in itertools.product(range(vocab), repeat=length):
            logits = torch.randn(vocab, generator=generator, dtype=torch.float64) * sharpness
            tree[prefix] = torch.softmax(logits, -1)
    return tree


def output_law(rule: Rule, target: Tree, drafter: Tree, vocab: int, gamma: int) -> dict[tuple[int, ...], float]:
    """Law of the first gamma + 1 output tokens: one round, then the target's own continuation."""
    law: dict[tuple[int, ...], float] = dict.fromkeys(itertools.product(range(vocab), repeat=gamma + 1), 0.0)
    for proposal in itertools.product(range(vocab), repeat=gamma):
        chance = 1.0
        for i, token in enumerate(proposal):
            chance *= float(drafter[proposal[:i]][token])
        p = torch.stack([target[proposal[:i]] for i in range(gamma + 1)])[None]
        q = torch.stack([drafter[proposal[:i]] for i in range(gamma)])[None]
        tokens, lengths = torch.tensor([proposal]), torch.tensor([gamma])
        by_length = rule.length_law(tokens, p, q, lengths)[0]
        for accepted in range(gamma + 1):
            following = rule.next_token_law(torch.tensor([accepted]), tokens, p, q, lengths)[0]
            for token in range(vocab):
                prefix = (*proposal[:accepted], token)
                weight = chance * float(by_length[accepted]) * float(following[token])
                for rest in itertools.product(range(vocab), repeat=gamma + 1 - len(prefix)):
                    whole = (*prefix, *rest)
                    law[whole] += weight * _continuation(target, whole, len(prefix))
    return law


def deviation(law: dict[tuple[int, ...], float], target: Tree) -> float:
    """Largest difference between an output law and the target's own."""
    return max(abs(found - _continuation(target, tokens, 0)) for tokens, found in law.items())


def largest_deviation(rule: Rule, vocab: int, gamma: int, tables: int, seed: int = 0) -> float:
    """Over `tables` random pairs of target and drafter."""
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(tables):
        target, drafter = random_tree(vocab, gamma + 1, generator), random_tree(vocab, gamma, generator)
        worst = max(worst, deviation(output_law(rule, target, drafter, vocab, gamma), target))
    return worst


def _continuation(target: Tree, tokens: tuple[int, ...], start: int) -> float:
    chance = 1.0
    for i in range(start, len(tokens)):
        chance *= float(target[tokens[:i]][tokens[i]])
    return chance

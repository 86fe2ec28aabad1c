"""Batches of conversations with random anchors; batch `step` depends on the seed and `step` alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftkit.data.features import FeatureSample, FeatureStore
from draftkit.draft.drafter import TrainBatch


@dataclass(frozen=True)
class Split:
    """Indices into a store: conversations to train on and conversations to validate on."""

    train: tuple[int, ...]
    validation: tuple[int, ...]


def split_store(store: FeatureStore, share: float, seed: int) -> Split:
    """Set aside about `share` of every domain, at least one conversation each, for validation."""
    by_domain: dict[str, list[int]] = {}
    for shard in store.manifest.shards:
        for entry in shard.samples:
            by_domain.setdefault(entry.domain, []).append(sum(map(len, by_domain.values())))
    validation: list[int] = []
    rng = random.Random(seed)
    for indices in by_domain.values():
        validation += rng.sample(indices, min(len(indices), max(1, round(share * len(indices)))))
    kept = set(validation)
    return Split(tuple(i for i in range(len(store)) if i not in kept), tuple(sorted(validation)))


class BatchSampler:
    """Groups conversations of similar length; every epoch shuffles within lengths and the order of the groups."""

    def __init__(self, store: FeatureStore, indices: Sequence[int], size: int, anchors: int, seed: int) -> None:
        self.store, self.indices, self.size, self.anchors, self.seed = store, tuple(indices), size, anchors, seed
        self.lengths = store.lengths()
        self._epoch = -1
        self._groups: list[list[int]] = []

    @property
    def per_epoch(self) -> int:
        """Batches that hold every conversation once; the last one may be smaller."""
        return -(-len(self.indices) // self.size)

    def batch(self, step: int) -> TrainBatch:
        """The batch of a step, with random anchors among the answers' tokens."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng = random.Random(self.seed * 7919 + epoch)
            order = sorted(self.indices, key=lambda i: self.lengths[i] * (1 + 0.1 * rng.random()))
            self._groups = [order[i : i + self.size] for i in range(0, len(order), self.size)]
            rng.shuffle(self._groups)
            self._epoch = epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return collate([self.store[i] for i in self._groups[place]], self.anchors, generator)


def validation_batches(store: FeatureStore, indices: Sequence[int], size: int, anchors: int) -> Iterator[TrainBatch]:
    """The same batches with the same anchors every time."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(indices), size):
        yield collate([store[i] for i in indices[start : start + size]], anchors, generator)


def collate(samples: Sequence[FeatureSample], anchors: int, generator: torch.Generator) -> TrainBatch:
    """Pad on the right and choose up to `anchors` anchors per conversation.

    An anchor is a token the assistant wrote that is followed by another one: what the drafter sees in use.
    """
    longest = max(len(s.tokens_T) for s in samples)
    chosen = []
    for s in samples:
        places = (s.loss_mask_T[:-1] & s.loss_mask_T[1:]).nonzero().squeeze(-1)
        picked = places[torch.randperm(len(places), generator=generator)[:anchors]]
        chosen.append(picked.sort().values)
    most = max(1, *(len(c) for c in chosen))
    domains = tuple(sorted({s.domain for s in samples}))
    return TrainBatch(
        tokens_BT=_pad([s.tokens_T for s in samples], longest),
        loss_mask_BT=_pad([s.loss_mask_T for s in samples], longest),
        features_BTF=_pad([s.features_TF.float() for s in samples], longest),
        last_hidden_BTH=_pad([s.last_hidden_TH.float() for s in samples], longest),
        anchors_BA=_pad(chosen, most),
        anchor_mask_BA=_pad([torch.ones(len(c), dtype=torch.bool) for c in chosen], most),
        document_BT=_pad([torch.zeros_like(s.tokens_T) for s in samples], longest, fill=-1),
        positions_BT=_pad([torch.arange(len(s.tokens_T)) for s in samples], longest),
        domain_BA=_pad([torch.full_like(c, domains.index(s.domain)) for s, c in zip(samples, chosen, strict=True)], most),
        domains=domains,
    )


def _pad(rows: Sequence[Tensor], length: int, fill: int = 0) -> Tensor:
    out = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out

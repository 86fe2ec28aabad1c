"""What a step trains on: its conversations, packed into rows, with random anchors.

Which conversations a step takes and which anchors they get depends on the seed and the step alone: neither on
the number of processes, nor on rows and micro-batches. So the objective is the same however it is cut, and a
run can go on with another number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from queue import Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftkit.draft.drafter import TrainBatch
from draftkit.features.source import FeatureSample, FeatureSource

PREFETCH = 2  # micro-batches that are ready ahead of time


@dataclass(frozen=True)
class Split:
    """Indices into a source, ascending: samples to train on and samples to validate on."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]


def split_source(source: FeatureSource, share: float, seed: int) -> Split:
    """Set aside about `share` of every domain's conversations, at least one each, for validation, with all
    their samples."""
    numbers = source.conversations()
    by_domain: dict[str, dict[int, None]] = {}
    for number, domain in zip(numbers.tolist(), source.domains(), strict=True):
        by_domain.setdefault(domain, {})[number] = None
    kept: list[int] = []
    rng = random.Random(seed)
    for there in by_domain.values():
        kept += rng.sample(list(there), min(len(there), max(1, round(share * len(there)))))
    aside = np.isin(numbers, kept)
    return Split(np.flatnonzero(~aside), np.flatnonzero(aside))


@dataclass(frozen=True)
class Cut:
    """How conversations become micro-batches: tokens per row (null: the longest conversation), rows per
    forward pass (null: all), and this process's share of the rows."""

    row_tokens: int | None = None
    micro_batch_size: int | None = None
    rank: int = 0
    processes: int = 1


class BatchMaker:
    """Makes the micro-batches of a step, or of the validation, from a source, one after the other."""

    def __init__(
        self,
        source: FeatureSource,
        indices: Sequence[int] | NDArray[np.int64],
        size: int,
        anchors: int,
        seed: int,
        cut: Cut,
        last_hidden: bool = True,
    ) -> None:
        """Without `last_hidden` batches hold none, [B, T, 0]: for losses that do not compare with the
        target."""
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.size, self.anchors, self.seed, self.cut = size, anchors, seed, cut
        self._last_hidden = last_hidden
        self.lengths = source.lengths()
        self.domains = tuple(sorted(set(source.domains())))
        self._weights = source.weights()[self.indices]
        self._order: tuple[int, NDArray[np.int64]] = (-1, self.indices)  # an epoch and its order

    @property
    def per_epoch(self) -> int:
        """Steps that take every sample as often as its weight says; the last one may be smaller."""
        return max(1, -(-round(float(self._weights.sum())) // self.size))

    def samples(self, step: int) -> list[int]:
        """The samples of a step: every epoch is a shuffle of its own."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._shuffled(epoch)
        return self._order[1][place * self.size : (place + 1) * self.size].tolist()

    def batches(self, step: int) -> Iterator[TrainBatch]:
        """This process's micro-batches of a step: the same number in every process, empty ones where rows run
        out."""
        seed = self.seed * 1_000_003 + step
        return (self._collated(group, seed) for group in self._groups(self.samples(step)))

    def validation(self) -> Iterator[tuple[int, TrainBatch]]:
        """All samples in order, with the same anchors every time; and about how many are done after each
        micro-batch, all processes together."""
        for start in range(0, len(self.indices), self.size):
            chosen = self.indices[start : start + self.size].tolist()
            groups = self._groups(chosen)
            for number, group in enumerate(groups, 1):
                yield start + len(chosen) * number // len(groups), self._collated(group, -1)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch; samples of weight 2 stand in it twice, of weight 0.25 in one of four."""
        rng = random.Random(self.seed * 7919 + epoch)
        place = list(range(len(self.indices)))
        rng.shuffle(place)
        if (self._weights != 1).any():
            ends = self._weights[place].cumsum()
            count = round(float(ends[-1]))
            points = (np.arange(count) + rng.random()) * (ends[-1] / max(1, count))
            place = np.array(place)[np.searchsorted(ends, points, "right")].tolist()
            rng.shuffle(place)
        order: NDArray[np.int64] = self.indices[place]
        return order

    def _groups(self, chosen: list[int]) -> list[list[list[int]]]:
        """Rows of samples by micro-batch, as many in every process; empty where rows run out."""
        lengths = self.lengths[chosen].tolist()
        rows = pack(lengths, max(*lengths, self.cut.row_tokens or 0))
        own = rows[self.cut.rank :: self.cut.processes]
        most = -(-len(rows) // self.cut.processes)  # rows of the first process
        size = min(self.cut.micro_batch_size or most, most)
        return [
            [[chosen[place] for place in row] for row in own[start : start + size]]
            for start in range(0, most, size)
        ]

    def _collated(self, rows: list[list[int]], seed: int) -> TrainBatch:
        if not rows:
            return empty_batch(self._trimmed(self.source.empty()), self.domains)
        wanted = dict.fromkeys(i for row in rows for i in row)  # a weight may ask for one twice
        found = map(self._trimmed, self.source.read(list(wanted), self._last_hidden))
        read = dict(zip(wanted, found, strict=True))
        samples = [[read[i] for i in row] for row in rows]
        anchors = [
            [
                choose_anchors(s.loss_mask_T, self.anchors, seed * 2_097_143 + i)
                for i, s in zip(*row, strict=True)
            ]
            for row in zip(rows, samples, strict=True)
        ]
        return collate(samples, anchors, self.domains)

    def _trimmed(self, sample: FeatureSample) -> FeatureSample:
        """Without what is not wanted: some sources give it all the same."""
        if self._last_hidden:
            return sample
        return replace(sample, last_hidden_TH=sample.last_hidden_TH[:, :0])


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first: places of the lengths that share a row of `capacity`. Longest rows come first.

    A length above the capacity has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[place]]
        if fitting:
            best = min(fitting, key=lambda r: room[r])
            rows[best].append(place)
            room[best] -= lengths[place]
        else:
            rows.append([place])
            room.append(capacity - lengths[place])
    return rows


def choose_anchors(loss_mask_T: Tensor, count: int, seed: int) -> Tensor:
    """Up to `count` random places, int64 [A], ascending: tokens the assistant wrote that are followed by
    another one, which is what the drafter starts from in use."""
    places = (loss_mask_T[:-1] & loss_mask_T[1:]).nonzero().squeeze(-1)
    generator = torch.Generator().manual_seed(seed % 2**63)
    return places[torch.randperm(len(places), generator=generator)[:count]].sort().values


def collate(
    rows: Sequence[Sequence[FeatureSample]], anchors: Sequence[Sequence[Tensor]], domains: tuple[str, ...]
) -> TrainBatch:
    """Lay the conversations of every row end to end and pad rows on the right; anchors [A] are places in a
    conversation."""
    lengths = [[len(s.tokens_T) for s in row] for row in rows]
    starts = [[sum(row[:i]) for i in range(len(row))] for row in lengths]
    longest = max(sum(row) for row in lengths)
    placed = [
        torch.cat([a + s for a, s in zip(*row, strict=True)]) for row in zip(anchors, starts, strict=True)
    ]
    most = max(1, *(len(a) for a in placed))
    owner = [
        torch.cat([torch.full_like(a, domains.index(s.domain)) for a, s in zip(*row, strict=True)])
        for row in zip(anchors, rows, strict=True)
    ]
    numbers = [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    return TrainBatch(
        tokens_BT=_pad([torch.cat([s.tokens_T for s in row]) for row in rows], longest),
        loss_mask_BT=_pad([torch.cat([s.loss_mask_T for s in row]) for row in rows], longest),
        features_BTF=_pad([torch.cat([s.features_TF for s in row]) for row in rows], longest),
        last_hidden_BTH=_pad([torch.cat([s.last_hidden_TH for s in row]) for row in rows], longest),
        document_BT=_pad(numbers, longest, fill=-1),
        positions_BT=_pad(positions, longest),
        anchors_BA=_pad(placed, most),
        anchor_mask_BA=_pad([torch.ones(len(a), dtype=torch.bool) for a in placed], most),
        domain_BA=_pad(owner, most),
        domains=domains,
    )


def empty_batch(empty: FeatureSample, domains: tuple[str, ...]) -> TrainBatch:
    """A batch without an anchor: no loss, no gradient, but a forward pass that keeps step with other
    processes."""
    sample = replace(empty, domain=domains[0])
    return collate([[sample]], [[torch.zeros(0, dtype=torch.int64)]], domains)


def to_device(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """The batch on a device."""
    tensors: dict[str, Any] = {
        name: value.to(device, non_blocking=True)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    return replace(batch, **tensors)


def pinned(batch: TrainBatch) -> TrainBatch:
    """The batch in memory that a GPU can copy from while it computes."""
    tensors: dict[str, Any] = {
        name: value.pin_memory()
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.device.type == "cpu"
    }
    return replace(batch, **tensors)


def steps_from(maker: BatchMaker, first: int, device: torch.device) -> Generator[Iterator[TrainBatch]]:
    """The micro-batches of step `first` and all that follow, one after the other: for a GPU they are made
    ahead, while it computes, where the source allows that.

    On a CPU that would cost more than it saves: a second thread's operations start a second team of OpenMP
    threads, and with more of these than cores none of them spins any more while it waits (a fourth of a small
    step's time).
    """
    if device.type != "cpu" and maker.source.ahead:
        yield from prefetched(maker, first)
    for step in count(first):
        yield maker.batches(step)


def prefetched(maker: BatchMaker, first: int) -> Generator[Iterator[TrainBatch]]:
    """The micro-batches of step `first` and all that follow, read and packed in a thread while the last one
    is computed; at most PREFETCH of them wait."""
    ready: Queue[TrainBatch | BaseException | None] = Queue(PREFETCH)  # None ends a step
    ended = Event()

    def work() -> None:
        try:
            for step in count(first):
                for batch in maker.batches(step):
                    if ended.is_set():
                        return
                    ready.put(pinned(batch) if torch.cuda.is_available() else batch)
                ready.put(None)
        except BaseException as error:
            ready.put(error)

    def one_step() -> Iterator[TrainBatch]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            yield one_step()
    finally:
        ended.set()
        while thread.is_alive():  # it may wait for room
            while not ready.empty():
                ready.get()
            thread.join(0.05)


def _pad(rows: Sequence[Tensor], length: int, fill: int = 0) -> Tensor:
    out = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out

"""A target whose layers are split over the processes that torchrun started: the first one captures, the
others compute their part of each pass that it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from draftkit.features.compute import Reader
from draftkit.features.record import Text


class LeadingReader:
    """Reads by all processes; the others are in `follow`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.failed = False  # in the middle of a pass: the others wait in it, and torchrun ends them

    def read(self, texts: Sequence[Text], last_hidden: bool = True) -> list[tuple[Tensor, Tensor]]:
        """See `Reader`."""
        self.failed = True
        dist.broadcast_object_list([(list(texts), last_hidden)], 0)
        found = self._reader.read(texts, last_hidden)
        self.failed = False
        return found


def follow(reader: Reader) -> None:
    """Read what the first process asks for, until it ends."""
    held: list[Any] = [None]
    while True:
        dist.broadcast_object_list(held, 0)
        if held[0] is None:
            return
        reader.read(*held[0])


@contextmanager
def led(reader: Reader) -> Iterator[LeadingReader | None]:
    """The reader of the first process; the others get None when there is nothing more to read. Ends the group
    of processes that loading the target began."""
    try:
        if dist.get_rank() > 0:
            follow(reader)
            yield None
            return
        leading = LeadingReader(reader)
        try:
            yield leading
        finally:
            if not leading.failed:
                dist.broadcast_object_list([None], 0)
    finally:
        dist.destroy_process_group()

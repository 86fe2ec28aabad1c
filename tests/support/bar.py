"""A progress bar that notes what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Counted:
    """What is counted, and the parts that there were."""

    def __init__(self, title: str = "", total: int | None = None) -> None:
        self.title, self.total, self.done = title, total, 0
        self.parts: list[Counted] = []
        self.seen: list[int] = []  # each count that there was

    def update(
        self,
        advance: int = 0,
        completed: int | None = None,
        total: int | None = None,
        note: str | None = None,
    ) -> None:
        """See `draftkit.progress.Bar`."""
        self.done = self.done + advance if completed is None else completed
        self.seen.append(self.done)

    @contextmanager
    def part(self, title: str, total: int | None) -> Iterator[Counted]:
        """See `draftkit.progress.Bar`."""
        self.parts.append(Counted(title, total))
        yield self.parts[-1]

"""What a long step is doing, on standard error: a bar on a terminal, a line now and then in a file or a
pipe."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

QUIET = 2.0  # seconds; what takes less is not told
LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Bar(Protocol):
    """Progress of one step: how many of `total` (None: nobody knows) are done, and a note in words."""

    def update(
        self,
        advance: int = 0,
        completed: int | None = None,
        total: int | None = None,
        note: str | None = None,
    ) -> None:
        """What is new; what is not given stays."""
        ...


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what is being done, once it has taken longer than people wait without a word, and how long it
    took."""
    began = time.monotonic()
    timer = threading.Timer(QUIET, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (took := time.monotonic() - began) > QUIET:
        print(f"{what}: {took:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(title: str, total: int | None, note: str = "") -> Iterator[Bar]:
    """A bar with remaining time on a terminal. Elsewhere a line after two seconds, and then every ten. Of
    several processes of one run (torchrun) the first one tells."""
    if os.environ.get("RANK", "0") != "0":
        yield _Silent()
        return
    if sys.stderr.isatty():
        with _rich_bar(title, total, note) as bar:
            yield bar
        return
    lines = _Lines(title, total, note)
    try:
        yield lines
    finally:
        lines.end()


class _Silent:
    """Of a process that tells nothing."""

    def update(self, *_: object, **__: object) -> None:
        """See `Bar`."""


class _Lines:
    """Lines that a thread writes, so that a step that makes no progress shows as such."""

    def __init__(self, title: str, total: int | None, note: str) -> None:
        self._title, self._total, self._done, self._note = title, total, 0, note
        self._began, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True, name="draftkit-progress")
        self._thread.start()

    def update(
        self,
        advance: int = 0,
        completed: int | None = None,
        total: int | None = None,
        note: str | None = None,
    ) -> None:
        """See `Bar`."""
        self._done = self._done + advance if completed is None else completed
        self._total = self._total if total is None else total
        self._note = self._note if note is None else note

    def end(self) -> None:
        """No line more; a last one where there were others."""
        self._over.set()
        self._thread.join()
        if time.monotonic() - self._began > QUIET:
            self._print()

    def _write(self) -> None:
        wait = QUIET
        while not self._over.wait(wait):
            self._print()
            wait = LINE_EVERY

    def _print(self) -> None:
        seconds = time.monotonic() - self._began
        counted = f"{self._done}/{self._total}" if self._total is not None else str(self._done)
        told = [f"{self._title} {counted}", *([self._note.strip()] if self._note else []), clock(seconds)]
        if self._total and "left" not in self._note and 0 < self._done < self._total:
            told.append(f"{clock(seconds * (self._total - self._done) / self._done)} left")
        print(", ".join(told), file=sys.stderr, flush=True)


@contextmanager
def _rich_bar(title: str, total: int | None, note: str) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Rich:
        def __init__(self, progress: Progress, task: TaskID) -> None:
            self._progress, self._task = progress, task

        def update(
            self,
            advance: int = 0,
            completed: int | None = None,
            total: int | None = None,
            note: str | None = None,
        ) -> None:
            given: dict[str, Any] = {"completed": completed, "total": total, "note": note}
            self._progress.update(
                self._task,
                advance=advance if completed is None else None,
                **{name: value for name, value in given.items() if value is not None},
            )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as progress:
        yield Rich(progress, progress.add_task(title, total=total, note=note))


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

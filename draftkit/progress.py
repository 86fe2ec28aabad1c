"""What a long step is doing, on standard error: a bar on a terminal, a line now and then in a file or a
pipe."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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

    def part(self, title: str, total: int | None) -> AbstractContextManager[Bar]:
        """Something else that is done meanwhile, with a name, a count and a clock of its own; afterwards the
        step goes on."""
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
def progress_bar(
    title: str, total: int | None, note: str = "", done: int = 0, percent: bool = False
) -> Iterator[Bar]:
    """A bar with remaining time on a terminal. Elsewhere a line after two seconds, and then every ten. Of
    several processes of one run (torchrun) the first one tells. `done` were so before it began; `percent`:
    the count is one of 100."""
    if os.environ.get("RANK", "0") != "0":
        yield SILENT
        return
    if sys.stderr.isatty():
        with _rich_bar(title, total, note, done, percent) as bar:
            yield bar
        return
    lines = _Lines(_Count(title, total, note, done, percent))
    try:
        yield lines
    finally:
        lines.end()


class _Silent:
    """Of a process that tells nothing."""

    def update(self, *_: object, **__: object) -> None:
        """See `Bar`."""

    @contextmanager
    def part(self, title: str, total: int | None) -> Iterator[Bar]:
        """See `Bar`."""
        yield self


SILENT: Bar = _Silent()


class _Count:
    """What is counted, and since when."""

    def __init__(
        self, title: str, total: int | None, note: str = "", done: int = 0, percent: bool = False
    ) -> None:
        self.title, self.total, self.note, self.percent = title, total, note, percent
        self.before = self.done = done
        self.began = self.moved = time.monotonic()

    def update(
        self,
        advance: int = 0,
        completed: int | None = None,
        total: int | None = None,
        note: str | None = None,
    ) -> None:
        """See `Bar`."""
        done = self.done + advance if completed is None else completed
        self.moved = self.moved if done == self.done else time.monotonic()
        self.done = done
        self.total = self.total if total is None else total
        self.note = self.note if note is None else note

    def line(self) -> str:
        """As it stands now. What is left is told by the rate until the count last moved, so that it never
        grows while nothing does."""
        now = time.monotonic()
        told = [f"{self.title} {_counted(self.done, self.total, self.percent)}"]
        told += [*([self.note] if self.note else []), clock(now - self.began)]
        made = self.done - self.before
        if self.total and "left" not in self.note and made > 0:
            left = (self.moved - self.began) * (self.total - self.done) / made - (now - self.moved)
            told += [f"{clock(left)} left"] if left > 0 else []
        return ", ".join(told)


def _counted(done: float, total: float | None, percent: bool) -> str:
    if percent:
        return f"{done:.0f} %"
    return f"{done:.0f}/{total:.0f}" if total is not None else f"{done:.0f}"


class _Lines:
    """Lines that a thread writes, so that a step that makes no progress shows as such."""

    def __init__(self, count: _Count) -> None:
        self._count, self._over = count, threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True, name="draftkit-progress")
        self._thread.start()

    def update(self, *new: Any, **named: Any) -> None:
        """See `Bar`."""
        self._count.update(*new, **named)

    @contextmanager
    def part(self, title: str, total: int | None) -> Iterator[Bar]:
        """See `Bar`."""
        whole, self._count = self._count, _Count(title, total)
        try:
            yield self
        finally:
            self._last()
            self._count = whole

    def end(self) -> None:
        """No line more; a last one where there were others."""
        self._over.set()
        self._thread.join()
        self._last()

    def _last(self) -> None:
        if time.monotonic() - self._count.began > QUIET:
            self._print()

    def _write(self) -> None:
        wait = QUIET
        while not self._over.wait(wait):
            self._print()
            wait = LINE_EVERY

    def _print(self) -> None:
        print(self._count.line(), file=sys.stderr, flush=True)


@contextmanager
def _rich_bar(title: str, total: int | None, note: str, done: int, percent: bool) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Counted(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(_counted(task.completed, task.total, task.fields["percent"]))

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

        @contextmanager
        def part(self, title: str, total: int | None) -> Iterator[Bar]:
            task = self._progress.add_task(title, total=total, note="", percent=False)
            try:
                yield Rich(self._progress, task)
            finally:
                self._progress.remove_task(task)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        Counted(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as progress:
        whole = progress.add_task(title, total=total, completed=done, note=note, percent=percent)
        yield Rich(progress, whole)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

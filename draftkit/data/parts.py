"""Work on one file of records, divided among processes and machines that share a disk.

Rows of prompts are cut into parts of PART. Who works on a part holds a lock on its file, which the system
takes away when the process dies, so that what a dead one left is taken over. A part whose lock file is gone
is finished: a run that goes on finds its first question by the names of the files, however many records
there are, and looks at all of them once, before it ends. Then one process joins the parts, in order, into the
file of records; a kill at any moment loses no finished record and doubles none.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from draftkit.data.conversations import count_lines
from draftkit.data.lines import record_line
from draftkit.data.messages import Conversation
from draftkit.data.records import Done, asked_hash, recover
from draftkit.errors import DataError
from draftkit.output import lock_of, naming

PART = 64  # rows
SYNC_SECONDS = 1.0  # a record survives the process at once, a power cut after this


class Part:
    """Some prompts that this process answers. `todo` are those without a record."""

    def __init__(self, path: Path, lock: FileLock, prompts: Sequence[Conversation]) -> None:
        self.todo = list(prompts)
        self._open = {p.id for p in prompts}
        self._path, self._lock, self._synced = path, lock, time.monotonic()
        self._file = path.open("ab")

    def add(self, record: Mapping[str, Any]) -> bool:
        """Keep a finished record; True when it was the part's last."""
        with naming(self._path):
            self._file.write(record_line(record))
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        return self.leave_out(record["id"])

    def leave_out(self, name: str) -> bool:
        """Nothing more comes of a prompt; True when it was the part's last."""
        self._open.discard(name)
        return not self._open

    def close(self) -> None:
        """Let go of it, finished or not."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        _let_go(self._lock, finished=not self._open)


def _let_go(lock: FileLock, finished: bool) -> None:
    if finished:
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


class SharedWork:
    """The parts of one file of records, `out`, in a folder beside it."""

    def __init__(self, out: Path) -> None:
        self._out, self._folder = out, out.with_name(out.name + ".parts")
        self._done: dict[str, Done] = {}
        self._size = -1  # of `out` when it was read
        self.busy = 0  # parts that others hold, as of the last walk

    @property
    def begun(self) -> bool:
        """Whether there are records already."""
        return any(f.stat().st_size for f in (self._out, *self._folder.glob("*.jsonl")) if f.exists())

    def count(self) -> int:
        """About how many rows are done, joined or not: of finished parts only the last one is read."""
        parts = sorted(self._folder.glob("*.jsonl"))
        full = [path for path in parts[:-1] if _is_finished(path)]
        counted = [path for path in (self._out, *parts) if path not in set(full) and path.exists()]
        return PART * len(full) + sum(map(count_lines, counted))

    @property
    def reasons(self) -> Mapping[str, Done]:
        """What is known of the records in `out`, by id."""
        return self._done

    def check(self, prompts: Iterable[Conversation]) -> None:
        """Raise DataError when a record, joined or not, answers another prompt of the same id."""
        there: dict[str, Done] = {}
        for path in (*self._folder.glob("*.jsonl"), self._out):
            there |= recover(path, cut=False)
        self._missing(list(prompts), there)

    def claims(
        self, prompts: Callable[[int], Iterable[Conversation | None]], all_parts: bool
    ) -> Iterator[Part]:
        """One walk over the rows that `prompts(first)` gives, None for one that is left out: the parts that
        have something to do and that nobody else holds.

        With `all_parts` every record is looked at; without, finished parts are passed over by their files
        alone. Raises DataError when a record answers another prompt of the same id.
        """
        self.busy = 0
        self._read_out()
        number = 0 if all_parts else self._first_unfinished()
        rows = iter(prompts(PART * number))
        while chunk := list(islice(rows, PART)):
            path = self._folder / f"{number:06d}.jsonl"
            asked = [prompt for prompt in chunk if prompt is not None]
            if (all_parts or not _is_finished(path)) and (part := self._claim(path, asked)):
                yield part
            number += 1

    def join(self) -> bool:
        """Put all parts into `out`, in order, when nobody works on one; True when `out` is complete."""
        if not self._folder.exists():
            return True
        lock = lock_of(self._folder / "join.lock")
        if lock is None:
            return False
        with lock:
            self._out.touch()
            done = recover(self._out)
            with naming(self._out), self._out.open("ab") as file:
                for path in sorted(self._folder.glob("*.jsonl")):
                    names = recover(path)  # cuts off what a kill tore
                    lines = path.read_bytes().splitlines(keepends=True)
                    for name, line in sorted(zip(names, lines, strict=True)):
                        if name not in done:
                            file.write(line)
                            done[name] = names[name]
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(self._folder, ignore_errors=True)
        self._done, self._size = done, self._out.stat().st_size
        return True

    def _first_unfinished(self) -> int:
        """The number of the first part that is not finished, by the names of the files."""
        locks = [int(path.stem) for path in self._folder.glob("[0-9]*.lock")]
        begun = [int(path.stem) for path in self._folder.glob("*.jsonl")]
        return min(locks, default=max(begun, default=-1) + 1)

    def _claim(self, path: Path, prompts: Sequence[Conversation]) -> Part | None:
        """A part with what it lacks; None when another process holds it, or when nothing is left to do."""
        if _is_finished(path) and not self._missing(prompts, recover(path, cut=False)):
            return None
        if not (path.exists() or self._missing(prompts, {})):
            return None
        lock = lock_of(path.with_suffix(".lock"))
        if lock is None:
            self.busy += 1
            return None
        there = recover(path)
        self._read_out()  # after the part, which another process may have joined meanwhile
        if missing := self._missing(prompts, there):
            return Part(path, lock, missing)
        _let_go(lock, finished=True)
        return None

    def _missing(self, prompts: Sequence[Conversation], there: Mapping[str, Done]) -> list[Conversation]:
        """Prompts without a record, neither in a part nor in `out`."""
        missing = []
        for prompt in prompts:
            done = there.get(prompt.id) or self._done.get(prompt.id)
            if done is None:
                missing.append(prompt)
            elif done.asked != asked_hash(prompt):
                raise DataError(
                    f"{self._out}: holds an answer to another prompt of id {prompt.id!r}; choose another "
                    f"file or remove it"
                )
        return missing

    def _read_out(self) -> None:
        size = self._out.stat().st_size if self._out.exists() else 0
        if size != self._size:
            # another process may be joining; what comes after this size is read the next time
            self._done, self._size = recover(self._out, cut=False), size


def _is_finished(part: Path) -> bool:
    return part.exists() and not part.with_suffix(".lock").exists()

"""Work on one file of records, divided among processes and machines that share a disk.

Prompts are cut into parts of PART. Who works on a part holds a lock on its file, which the system takes away
when the process dies, so that what a dead one left is taken over. When all parts are there one process joins
them, in order, into the file of records; a kill at any moment loses no finished record and doubles none.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
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

PART = 64  # prompts
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
        self._open.discard(record["id"])
        return not self._open

    def close(self) -> None:
        """Let go of it, finished or not."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._lock.release()


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
        """Finished records, joined or not."""
        files = (f for f in (self._out, *self._folder.glob("*.jsonl")) if f.exists())
        return sum(count_lines(f) for f in files)

    @property
    def reasons(self) -> Mapping[str, Done]:
        """What is known of the records in `out`, by id."""
        return self._done

    @property
    def reached(self) -> int:
        """Prompts before the last part that was begun: a run that goes on finds work after them at once."""
        return PART * max((int(f.stem) for f in self._folder.glob("*.jsonl")), default=0)

    def claims(self, prompts: Iterator[Conversation], first: int = 0) -> Iterator[Part]:
        """One walk over all prompts, or those from `first` on: the parts that have something to do and
        that nobody else holds. Raises DataError when a record answers another prompt of the same id."""
        self.busy, number = 0, first // PART
        self._read_out()
        while chunk := list(islice(prompts, PART)):
            self._check_asked(chunk, self._done)
            missing = [p for p in chunk if p.id not in self._done]
            if missing and (part := self._claim(self._folder / f"{number:06d}.jsonl", missing)):
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
                    file.writelines(
                        line for name, line in sorted(zip(names, lines, strict=True)) if name not in done
                    )
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(self._folder, ignore_errors=True)
        self._read_out()
        return True

    def _claim(self, path: Path, prompts: Sequence[Conversation]) -> Part | None:
        """A part with what it lacks; None when another process holds it, or when nothing is left to do."""
        lock = lock_of(path.with_suffix(".lock"))
        if lock is None:
            self.busy += 1
            return None
        self._read_out()  # another process may have joined the parts meanwhile
        done = self._done | recover(path)
        self._check_asked(prompts, done)
        if missing := [p for p in prompts if p.id not in done]:
            return Part(path, lock, missing)
        lock.release()
        return None

    def _check_asked(self, prompts: Sequence[Conversation], done: Mapping[str, Done]) -> None:
        other = next((p.id for p in prompts if p.id in done and done[p.id].asked != asked_hash(p)), None)
        if other is not None:
            raise DataError(
                f"{self._out}: holds an answer to another prompt of id {other!r}; choose another file or "
                f"remove it"
            )

    def _read_out(self) -> None:
        size = self._out.stat().st_size if self._out.exists() else 0
        if size != self._size:
            self._done = recover(self._out)
            self._size = self._out.stat().st_size if self._out.exists() else 0

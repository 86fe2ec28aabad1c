"""Files of conversations, row by row: JSONL, a JSON array, or Parquet (through `datasets`), read without
holding them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from draftkit.data.lines import NestedError, check_line, json_value
from draftkit.data.messages import Conversation, Message
from draftkit.data.row_forms import conversation_of
from draftkit.errors import DataError
from draftkit.suggest import no_file

__all__ = [
    "Conversation",
    "Message",
    "SkippedRows",
    "iterate_conversations",
    "iterate_rows",
    "read_conversations",
]

NAMED = 10  # rows that are left out are named up to here, then counted
CHECKED_FIRST = 1000  # rows that are read before anything heavy is loaded


@dataclass
class SkippedRows:
    """Rows that were left out: how many, and the reasons of the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, reason: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(reason)

    def anew(self) -> SkippedRows:
        """The same, emptied: the rows are read from the beginning."""
        self.count, self.first = 0, []
        return self

    def report(self) -> None:
        """Say on standard error what was left out, if anything was."""
        for reason in self.first:
            print(f"left out: {reason}", file=sys.stderr)
        if self.count > len(self.first):
            print(f"left out: {self.count} rows in all", file=sys.stderr)


def read_conversations(paths: Iterable[Path]) -> list[Conversation]:
    """All conversations of some files. Raises DataError that names the file, the line and what is wrong with
    it."""
    return list(iterate_conversations(paths))


def iterate_conversations(
    paths: Iterable[Path], skipped: SkippedRows | None = None, switches: Mapping[str, Any] | None = None
) -> Iterator[Conversation]:
    """Conversations one after the other, in the order of the files; of what was read only the ids are
    remembered.

    Rows that are wrong are left out into `skipped`, where it is given. Raises DataError that names the file,
    the line and what is wrong otherwise, and for files that hold none. With `switches` (those of a
    DeepSeek-V4 target) messages are wrong, too, whose fields it cannot be shown with these.
    """
    return (found for found in iterate_rows(paths, skipped, 0, switches) if found is not None)


def iterate_rows(
    paths: Iterable[Path],
    skipped: SkippedRows | None = None,
    first: int = 0,
    switches: Mapping[str, Any] | None = None,
) -> Iterator[Conversation | None]:
    """`iterate_conversations` row by row: None for one that is left out. The `first` rows are passed over
    without being looked at."""
    seen: set[bytes] = set()
    number = 0
    for path in paths:
        held = False
        for where, found in _rows(path):
            held, number = True, number + 1
            if number <= first:
                continue
            try:
                row = _checked(found, where) if isinstance(found, bytes) else found
                conversation = conversation_of(row, where, path.stem, switches)
                digest = blake2b(conversation.id.encode(), digest_size=8).digest()
                if digest in seen:
                    raise DataError(f"{where}: id {conversation.id!r} was there before; ids must be unique")
            except DataError as error:
                if skipped is None:
                    raise
                skipped.add(str(error))
                yield None
                continue
            seen.add(digest)
            yield conversation
        if not held:
            raise DataError(f"{path}: holds no conversation; write one JSON object per line")


def count_lines(path: Path) -> int:
    """Line ends in a file, which is not held."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def count_rows(paths: Iterable[Path]) -> int | None:
    """About how many conversations some files hold, for a remaining time; None where that would cost a
    reading of its own (Parquet, JSON arrays)."""
    files = list(paths)
    if any(not path.is_file() or path.suffix in (".parquet", ".json") for path in files):
        return None
    return sum(count_lines(path) for path in files)


def check_beginning(
    paths: Iterable[Path], skip_invalid: bool, switches: Mapping[str, Any] | None = None
) -> None:
    """Read the first rows, so that a file of something else is told before anything heavy is loaded."""
    for path in paths:
        skipped = SkippedRows() if skip_invalid else None
        for _ in islice(iterate_conversations([path], skipped, switches), CHECKED_FIRST):
            pass


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file; rows of JSONL as they stand there, in bytes."""
    if not path.is_file():
        raise DataError(f"{path}: {no_file(path, 'a JSONL file of conversations')}")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open("rb") as file:
        first = file.read(4096).lstrip()[:1]
        file.seek(0)
        if first == b"[" and path.suffix == ".json":
            rows = _parsed(file.read(), str(path))
            yield from ((f"{path}:{i}", row) for i, row in enumerate(rows, 1))
            return
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield f"{path}:{number}", raw


def _checked(raw: bytes, where: str) -> Any:
    """A row of JSONL that says what its digest vouches for. Raises DataError."""
    row = _parsed(raw, where)
    check_line(raw, where)
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet is read through `datasets`; pip install 'draftkit[data]'"
        ) from error
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from ((f"{path}:{i}", dict(row)) for i, row in enumerate(rows, 1))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split()):.120})") from error


def _parsed(raw: bytes, where: str) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 (byte {error.start}); convert the file") from error
    try:
        return json_value(text.rstrip("\r\n"))  # or what is missing at the end is told of column 1
    except json.JSONDecodeError as error:
        hint = "the line is cut off" if not text.endswith("\n") else "one JSON object per line is needed"
        raise DataError(f"{where}: is not JSON ({error.msg} at column {error.colno}); {hint}") from error
    except NestedError as error:
        raise DataError(f"{where}: is {error}") from error
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise DataError(f"{where}: holds a number that is too long for a conversation; remove it") from error

"""The index of a feature store: what was written where. Lines of JSON are appended and never changed; each
ends with a CRC-32 of itself. Every process that writes has a file of its own, index-000.jsonl and so on.

    record   a record of shard-WWW-NNNNN.bin: place, bytes, SHA-256, and what it is a record of
    begun    a run of conversations is worked on: their digest, so that no others are mixed in after a kill
    part     a run of conversations is done: as many records, these conversations, these left out
    input    all parts of one set of conversations are done
    drop     the record at a place is damaged and counts no more; its part is open again

A line without its end is what a kill tore off: it counts as never written.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftkit.errors import FeatureStoreError

HOW_TO_REPAIR = "`draftkit features verify --repair` leaves out what is damaged; then run capture again"
FILES = "index-*.jsonl"
CHECK = ',"check":"'  # begins the end of a line
LINE_BYTES = 512  # read at once of a line: most are shorter, and 8 KiB are more than many a record
Place = tuple[int, int, int]  # writer, shard, offset
Key = tuple[int, int, int]  # conversation, sample, window


_as_json = json.JSONEncoder(separators=(",", ":")).encode  # made once, not for each line


def index_line(note: dict[str, Any]) -> bytes:
    """A note as a line with its checksum."""
    text = _as_json(note)[:-1]
    return f'{text}{CHECK}{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def read_line(line: bytes) -> dict[str, Any]:
    """The note of a line. Raises ValueError when its checksum is another one."""
    text, found, check = line.rpartition(CHECK.encode())
    if not found or check != f'{zlib.crc32(text):08x}"}}'.encode():
        raise ValueError("its checksum differs")
    note: dict[str, Any] = json.loads(text + b"}")
    return note


def shard_name(writer: int, number: int) -> str:
    """The file of a shard."""
    return f"shard-{writer:03d}-{number:05d}.bin"


@dataclass(frozen=True)
class Record:
    """Where the record of a text lies, and what it is: `tokens` that were read, the window begins at
    `start`."""

    key: Key
    part: int
    place: Place
    size: int
    tokens: int
    start: int
    id: str
    domain: str
    text_crc: int  # CRC-32 of the text, which is often read alone
    sha256: str

    def note(self) -> dict[str, Any]:
        """Its line in the index."""
        about = {"key": self.key, "part": self.part, "place": self.place, "size": self.size}
        about |= {"tokens": self.tokens, "start": self.start, "id": self.id, "domain": self.domain}
        return {"record": about | {"text_crc": self.text_crc, "sha256": self.sha256}}


class IndexLines:
    """Lines of index files by their place. Threads may share it."""

    def __init__(self) -> None:
        self.files: list[Path] = []

    def record(self, file: int, at: int) -> Record:
        """The record of a line."""
        with self.files[file].open("rb", LINE_BYTES) as opened:
            opened.seek(at)
            line = opened.readline()
        try:
            note = read_line(line[:-1])["record"]
            key, place = (tuple(note.pop(name)) for name in ("key", "place"))
            return Record(key=key, place=place, **note)
        except (ValueError, KeyError, TypeError) as error:
            raise FeatureStoreError(f"{self.files[file]}: is damaged at byte {at} ({error})") from error


COLUMNS = (
    *("conversation", "sample", "window", "part", "writer", "shard", "offset", "size", "tokens", "start"),
    "text_crc",
)


class Index:
    """All index files of a folder, read as far as they go; `refresh` reads what was added since.

    Of a record stay 14 numbers in memory; its line is read again when it is asked for. Raises
    FeatureStoreError that names file and line for one that is damaged; with `damaged` these are collected
    there instead.
    """

    def __init__(self, folder: Path, damaged: list[str] | None = None) -> None:
        self.folder, self._damaged = folder, damaged
        self.parts: dict[int, dict[str, Any]] = {}
        self.inputs: dict[int, dict[str, Any]] = {}  # by first part
        self.begun: dict[int, str] = {}  # digest of the conversations of each part
        self.written: dict[int, int] = {}  # records of each part
        self._read: dict[Path, int] = {}  # bytes of each file
        self._lines: dict[Path, int] = {}
        self._columns = {name: array("q") for name in (*COLUMNS, "file", "line_at", "domain")}
        self._dropped: set[Place] = set()
        self.domain_names: dict[str, int] = {}
        self.lines = IndexLines()
        self.refresh()

    def refresh(self, own: Path | None = None) -> None:
        """Read what was added since, to all files or to `own`: a folder may hold many thousand shards to look
        through."""
        for path in [own] if own else sorted(self.folder.glob(FILES)):
            if path not in self._read:
                self.lines.files.append(path)
            at = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(at)
                for line in file:
                    if not line.endswith(b"\n"):  # torn by a kill, or being written
                        break
                    self._lines[path] = self._lines.get(path, 0) + 1
                    self._take(line[:-1], path, at)
                    at += len(line)
            self._read[path] = at

    def take_own(self, path: Path, notes: Sequence[dict[str, Any]], lines: Sequence[bytes]) -> None:
        """Take up what this process has just appended to its own file, which was read as far as there: a
        record's numbers need not be parsed again."""
        at = self._read[path]
        for note, line in zip(notes, lines, strict=True):
            self._lines[path] = self._lines.get(path, 0) + 1
            if "record" in note:
                self._take_record(note["record"], path, at)
            else:
                self._take(line[:-1], path, at)
            at += len(line)
        self._read[path] = at

    def end_of(self, path: Path) -> int:
        """Bytes of whole lines of a file."""
        return self._read.get(path, 0)

    def shard_ends(self, writer: int) -> tuple[int, int]:
        """(number, bytes) of a writer's last shard, as far as the index knows of it."""
        columns = self.columns()
        own = columns["writer"] == writer
        if not own.any():
            return 0, 0
        last = int(columns["shard"][own].max())
        there = own & (columns["shard"] == last)
        return last, int((columns["offset"] + columns["size"])[there].max())

    def is_done(self, part: int) -> bool:
        """Whether a part is there with all its records."""
        return part in self.parts and self.written.get(part, 0) >= self.parts[part]["records"]

    def keys_of(self, part: int) -> set[Key]:
        """Which records of a part are there."""
        if not self.written.get(part):  # most are new: no walk through all that was written before
            return set()
        columns = self.columns()
        rows = np.flatnonzero((columns["part"] == part) & self.alive())
        three = [columns[name][rows].tolist() for name in ("conversation", "sample", "window")]
        return set(zip(*three, strict=True))

    def columns(self, first: int = 0) -> dict[str, NDArray[np.int64]]:
        """One number for each record from row `first` on, by name, dropped ones included."""
        return {name: np.array(values[first:], np.int64) for name, values in self._columns.items()}

    def alive(self, first: int = 0) -> NDArray[np.bool_]:
        """Which records from row `first` on were not dropped."""
        kept = np.ones(len(self._columns["part"]) - first, bool)
        if self._dropped:
            places = zip(*(self._columns[n][first:] for n in ("writer", "shard", "offset")), strict=True)
            kept[:] = [place not in self._dropped for place in places]
        return kept

    def record(self, row: int) -> Record:
        """A record, from its line."""
        return self.lines.record(self._columns["file"][row], self._columns["line_at"][row])

    def _take(self, line: bytes, path: Path, at: int) -> None:
        try:
            note = read_line(line)
            if "record" in note:
                self._take_record(note["record"], path, at)
            elif "begun" in note:
                self.begun[int(note["begun"])] = str(note["digest"])
            elif "part" in note:
                self.parts[int(note["part"])] = note
            elif "input" in note:
                self.inputs[int(note["first"])] = note
            elif "drop" in note:
                self._take_drop(note)
            else:
                raise ValueError("it is of no kind that this draftkit knows")
        except (ValueError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
            told = f"{path}: line {self._lines[path]} is damaged ({error})"
            if self._damaged is None:
                raise FeatureStoreError(f"{told}; {HOW_TO_REPAIR}") from error
            self._damaged.append(told)

    def _take_record(self, note: dict[str, Any], path: Path, at: int) -> None:
        numbers = [*note["key"], note["part"], *note["place"], note["size"], note["tokens"], note["start"]]
        numbers.append(note["text_crc"])
        if len(numbers) != len(COLUMNS) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("its numbers must be whole and from 0 on")
        if not 0 <= note["start"] < note["tokens"] or len(bytes.fromhex(note["sha256"])) != 32:
            raise ValueError("no record is like that")
        domain = self.domain_names.setdefault(str(note["domain"]), len(self.domain_names))
        where = (self.lines.files.index(path), at, domain)
        for column, number in zip(self._columns.values(), (*numbers, *where), strict=True):
            column.append(number)
        self.written[note["part"]] = self.written.get(note["part"], 0) + 1

    def _take_drop(self, note: dict[str, Any]) -> None:
        writer, shard, offset = (int(n) for n in note["drop"])
        self._dropped.add((writer, shard, offset))
        part = int(note["of_part"])
        self.written[part] = self.written.get(part, 0) - 1

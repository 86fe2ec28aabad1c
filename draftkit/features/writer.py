"""Writing into a feature store: each process has an index file and shards of its own, so that nobody waits
for anybody. Records go to a shard first, their lines to the index after; a kill at any moment leaves whole
records, and a tail that the next writer cuts off."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

from draftkit.errors import FeatureStoreError
from draftkit.features.index import Index, Record, index_line, shard_name
from draftkit.features.record import Text
from draftkit.output import lock_of, naming

SHARD_BYTES = 2**30
SPARE_BYTES = 256 * 2**20  # left free on the disk
SYNC_SECONDS = 1.0  # a record survives the process at once, a power cut after this
WORK = "work"  # the folder of locks


class StoreWriter:
    """The first index file that nobody writes, and its shards. `index` is what the whole store holds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        while (lock := lock_of(folder / WORK / f"writer-{self.number:03d}.lock")) is None:
            self.number += 1
        self._lock = lock
        self.index = Index(folder)
        self._path = folder / f"index-{self.number:03d}.jsonl"
        with naming(self._path):
            self._lines = self._path.open("ab")
            self._lines.truncate(self.index.end_of(self._path))  # what a kill tore off
        self.index.refresh(self._path)
        self._shard_number, end = self.index.shard_ends(self.number)
        self._open_shard(end)
        self._synced = time.monotonic()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._shard.close()
            self._lines.close()
        finally:
            self._lock.release()

    def add(self, records: list[tuple[Text, int, bytes]]) -> None:
        """Write records of (text, part, bytes): all of them, or after a kill the first few."""
        lines = []
        for text, part, record in records:
            if self._size and self._size + len(record) > SHARD_BYTES:
                self._next_shard()
            place = (self.number, self._shard_number, self._size)
            with naming(self.folder / shard_name(*place[:2])):
                self._shard.write(record)
            self._size += len(record)
            tokens = len(text.tokens_E)
            checks = zlib.crc32(record[: 4 * tokens]), hashlib.sha256(record).hexdigest()
            about = (tokens, text.start, text.id, text.domain, *checks)
            lines.append(Record(text.key, part, place, len(record), *about).note())
        self.note(*lines)

    def note(self, *notes: dict[str, Any]) -> None:
        """Append lines to the index, after the records that they are about."""
        with naming(self.folder / shard_name(self.number, self._shard_number)):
            self._shard.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._shard.fileno())
        lines = [index_line(note) for note in notes]
        with naming(self._path):
            self._lines.write(b"".join(lines))
            self._lines.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._lines.fileno())
                self._synced = time.monotonic()
        self.index.take_own(self._path, notes, lines)

    def _next_shard(self) -> None:
        with naming(self.folder / shard_name(self.number, self._shard_number)):
            self._shard.flush()
            os.fsync(self._shard.fileno())
            self._shard.close()
        self._shard_number += 1
        self._open_shard(0)

    def _open_shard(self, end: int) -> None:
        path = self.folder / shard_name(self.number, self._shard_number)
        with naming(path):
            self._shard = path.open("ab")
            if os.fstat(self._shard.fileno()).st_size > end:
                self._shard.truncate(end)
        self._size = end


def check_room(folder: Path, needed: int) -> None:
    """Raise FeatureStoreError when the disk under `folder` has less than `needed` bytes to spare."""
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    if needed > free:
        raise FeatureStoreError(
            f"{folder}: {needed / 2**30:.2f} GiB are needed, {max(0, free) / 2**30:.2f} GiB are free; "
            "free some, choose another disk, fewer conversations, fewer feature layers or capture.dtype=fp8"
        )

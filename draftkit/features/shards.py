"""Records read from shards, each by itself, and checked against its line in the index."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from threading import Lock

from draftkit.errors import FeatureStoreError
from draftkit.features.index import HOW_TO_REPAIR, Record, shard_name
from draftkit.features.record import RecordForm, Text, decode_text
from draftkit.features.source import FeatureSample


class Shards:
    """The shards of a folder. Threads may share it. Raises FeatureStoreError that names a record which is
    damaged."""

    def __init__(self, folder: Path, form: RecordForm) -> None:
        self.folder, self._form = folder, form
        self._opened: dict[tuple[int, int], int] = {}
        self._opening = Lock()

    def sample(self, record: Record, check: bool) -> FeatureSample:
        """A record's sample; with `check` its checksum is compared."""
        raw = self._read(record, record.size)
        if check and hashlib.sha256(raw).hexdigest() != record.sha256:
            raise self._damaged(record)
        return self._form.decode(raw, record.tokens, record.start, record.id, record.domain)

    def text(self, record: Record) -> Text:
        """A record's text, checked."""
        raw = self._read(record, 4 * record.tokens)
        if zlib.crc32(raw) != record.text_crc:
            raise self._damaged(record)
        return Text(record.key, record.id, record.domain, *decode_text(raw, record.tokens), record.start)

    def __del__(self) -> None:
        for file in self._opened.values():
            os.close(file)

    def _damaged(self, record: Record) -> FeatureStoreError:
        where = self.folder / shard_name(*record.place[:2])
        return FeatureStoreError(
            f"{where}: record {record.id!r} at byte {record.place[2]} is damaged (checksum differs); "
            f"{HOW_TO_REPAIR}"
        )

    def _read(self, record: Record, size: int) -> bytes:
        shard = record.place[:2]
        with self._opening:
            if shard not in self._opened:
                path = self.folder / shard_name(*shard)
                try:
                    self._opened[shard] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    told = f"{path}: cannot be read ({error.strerror}); {HOW_TO_REPAIR}"
                    raise FeatureStoreError(told) from error
        return os.pread(self._opened[shard], size, record.place[2])

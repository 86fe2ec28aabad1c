"""A whole scan of a feature store: every line of its index, every record of its shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from draftkit.errors import FeatureStoreError
from draftkit.features.index import FILES, Index, read_line
from draftkit.features.manifest import read_manifest
from draftkit.features.shards import Shards
from draftkit.features.writer import WORK, StoreWriter
from draftkit.output import lock_of, naming


@dataclass(frozen=True)
class Verified:
    """Records that were read, their bytes, and one line for each fault."""

    records: int
    bytes: int
    damaged: tuple[str, ...]


def verify(
    folder: Path, repair: bool = False, tick: Callable[[int, int], None] = lambda done, total: None
) -> Verified:
    """Read everything in a store, finished or not. With `repair` damaged records are dropped, and damaged
    lines of the index taken out, so that capture writes again what they were; the rest stays.

    Raises FeatureStoreError when there is no store, its manifest is damaged, or, with `repair`, another
    process writes it.
    """
    form = read_manifest(folder).form
    damaged: list[str] = []
    index = Index(folder, damaged)
    shards = Shards(folder, form)
    drops = []
    alive = index.alive().tolist()
    total = 0
    for row, counts in enumerate(alive):
        if counts:
            record = index.record(row)
            total += record.size
            try:
                shards.sample(record, check=True)
            except FeatureStoreError as error:
                damaged.append(str(error).split(";")[0])
                drops.append({"drop": record.place, "of_part": record.part})
        tick(row + 1, len(alive))
    if repair and damaged:
        _repair(folder, drops)
    return Verified(sum(alive), total, tuple(damaged))


def _repair(folder: Path, drops: list[dict[str, object]]) -> None:
    for path in sorted(folder.glob(FILES)):
        lock = lock_of(folder / WORK / f"writer-{path.stem.removeprefix('index-')}.lock")
        if lock is None:
            raise FeatureStoreError(f"{folder}: another process writes it; wait for its end")
        try:
            _take_out_damaged_lines(path)
        finally:
            lock.release()
    with StoreWriter(folder) as writer:
        writer.note(*drops)


def _take_out_damaged_lines(path: Path) -> None:
    """The one time that an index is written anew."""
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if _is_whole(line)]
    if len(whole) < len(lines):
        partial = path.with_name(path.name + ".partial")
        with naming(path), partial.open("wb") as file:
            file.writelines(whole)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def _is_whole(line: bytes) -> bool:
    try:
        read_line(line.removesuffix(b"\n"))
    except (ValueError, UnicodeDecodeError):
        return False
    return line.endswith(b"\n")

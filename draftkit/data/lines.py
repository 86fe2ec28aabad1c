"""Records as lines of a file. A line ends with a digest of all before it, so that an edited letter is
found on reading."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from draftkit.errors import DataError

DIGEST = "record_digest"
NESTED = 100  # levels of a row: what writes, renders or masks it calls itself for each
_TAIL = re.compile(rb', "([^"]*)": "([0-9a-f]{32})"}\s*$')


class NestedError(ValueError):
    """JSON whose lists and objects lie more than `most` levels within one another."""

    def __init__(self, most: int) -> None:
        super().__init__(f"nested too deeply for a conversation (more than {most} levels)")


def json_value(text: str | bytes, most: int = NESTED) -> Any:
    """What JSON says, of so many levels at most. Raises ValueError when it is none, NestedError."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise NestedError(most) from error
    inner = [found]
    for _ in range(most + 1):
        inner = [one for one in inner if isinstance(one, dict | list)]
        if not inner:
            return found
        inner = [child for one in inner for child in (one.values() if isinstance(one, dict) else one)]
    raise NestedError(most)


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as its line of a file, without a digest."""
    return _written(row) + b"\n"


def record_line(record: Mapping[str, Any]) -> bytes:
    """A record as its line of a file, with its digest. What resuming needs (id, asked, finish_reason) comes
    first."""
    written = _written(record)
    return written[:-1] + f', "{DIGEST}": "{_digest(written)}"}}\n'.encode()


def check_line(line: bytes, where: str) -> None:
    """Raise DataError when a line does not say what its digest vouches for, or when it is damaged. A line
    without one is taken as it is, but not one whose digest has another name; spaces and escapes that another
    program writes differently change nothing."""
    if (tail := _TAIL.search(line)) and tail[2].decode() == _digest(line[: tail.start()] + b"}"):
        if tail[1].decode(errors="replace") == DIGEST:
            return
        raise DataError(f"{where}: was changed after it was written (its {DIGEST} has another name)")
    if DIGEST.encode() not in line:
        return
    try:
        row = json_value(line)
    except NestedError as error:
        raise DataError(f"{where}: is {error}") from error
    except ValueError as error:
        raise DataError(f"{where}: is no JSON any more ({error}); answer it again") from error
    if not isinstance(row, dict) or DIGEST not in row:
        return
    said = {name: value for name, value in row.items() if name != DIGEST}
    if _digest(_written(said)) != row[DIGEST]:
        raise DataError(
            f"{where}: was changed after it was written (id {row.get('id')!r:.60}); answer it again, or "
            f"remove {DIGEST} to take it as it is"
        )


def _written(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _digest(written: bytes) -> str:
    return hashlib.blake2b(written, digest_size=16).hexdigest()

"""Files that vouch for themselves: a note of JSON holds a digest of all that it says, and what it says of
other files is their sha256. A flipped bit, a letter or a number that somebody changed is found on reading.
This is no signature: whoever can write the file can write its digest, too.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftkit.errors import DraftkitError, reason

DIGEST = "digest"  # the field that holds it
MAX_JSON = 2**30  # bytes of a JSON file; the manifest of ten million conversations has less


def digest_of(note: Mapping[str, Any]) -> str:
    """sha256 of a note without its digest, in hexadecimal; the order of fields does not count."""
    said = {name: value for name, value in note.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(note: Mapping[str, Any]) -> dict[str, Any]:
    """The note with its digest."""
    return {**note, DIGEST: digest_of(note)}


def is_intact(note: Mapping[str, Any]) -> bool:
    """Whether a note still says what it was sealed with; one that was never sealed is not intact."""
    return note.get(DIGEST) == digest_of(note)


def was_changed(note: Mapping[str, Any]) -> bool:
    """Whether a note says something else than it was sealed with, be it the name of its digest alone. One
    that was never sealed was not changed."""
    if DIGEST in note:
        return not is_intact(note)
    digests = [name for name, value in note.items() if isinstance(value, str) and len(value) == 64]
    return any(digest_of({k: v for k, v in note.items() if k != name}) == note[name] for name in digests)


def read_json(path: Path, error: type[DraftkitError], otherwise: str = "is damaged") -> Any:
    """What a JSON file says. Raises `error` when it is no regular file, too large, or no JSON that Python can
    hold, which is told by `otherwise`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: is no regular file")
        if status.st_size > MAX_JSON:
            raise error(f"{path}: has {status.st_size} bytes, and {MAX_JSON} are allowed")
        return json.loads(path.read_text("utf-8"))
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); give another file") from cause
    except (ValueError, RecursionError) as cause:  # a number of 5,000 digits, or nested too deeply
        raise error(f"{path}: {otherwise} ({reason(cause)})") from cause


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file in the same folder, and nothing that leads elsewhere."""
    return (
        isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
    )

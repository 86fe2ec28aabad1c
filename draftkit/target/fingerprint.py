"""A target's fingerprint: it changes whenever weights, configuration or tokenizer change."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

WHOLE_FILE_BYTES = 2**26  # larger files are sampled
SOURCE = "unpacked-from.sha256"
WINDOWS, WINDOW_BYTES = 256, 4096


def fingerprint(folder: Path) -> str:
    """sha256 over `config.json`, `tokenizer.json` and every `*.safetensors` of a folder, in the order of
    their names.

    Files up to 64 MiB count whole. Of larger ones count the name, the size, the safetensors header (names,
    shapes and types of all tensors) and 256 evenly spread windows of 4 KiB: a checkpoint of 100 GB takes less
    than a second, and a fine-tune of the same shape differs, because it moves nearly every weight. A folder
    that was unpacked from another file says that file's fingerprint in `SOURCE`: how libraries write
    configurations differs from version to version.
    """
    if (folder / SOURCE).exists():
        return (folder / SOURCE).read_text("ascii").strip()
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]):
        if path.exists():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            hash_contents(path, digest)
    return digest.hexdigest()


def hash_contents(path: Path, digest: Hash) -> None:
    """Add the contents of a file to a digest; of a large one its beginning and windows, see `fingerprint`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            digest.update(file.read())
            return
        header = int.from_bytes(file.read(8), "little")  # a safetensors file begins with its header's length
        digest.update(file.read(min(header, WHOLE_FILE_BYTES)))
        for window in range(WINDOWS):
            file.seek(window * (size - WINDOW_BYTES) // (WINDOWS - 1))
            digest.update(file.read(WINDOW_BYTES))

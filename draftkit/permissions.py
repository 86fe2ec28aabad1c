"""Who may read what draftkit writes: whoever may read the other files of the same user."""

from __future__ import annotations

import tempfile
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Give a file the mode that `open` gives a new one. safetensors writes files that nobody but their owner
    may read."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        example = Path(folder) / "example"
        example.touch()  # the umask can only be read by setting it, which other threads would notice
        path.chmod(example.stat().st_mode)

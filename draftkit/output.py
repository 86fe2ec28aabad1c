"""How results are written: a place that cannot take them is named before the work, files are replaced in one rename."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from draftkit.errors import ConfigError


def make_folder(out: Path) -> None:
    """Make the folder where results go. Raises ConfigError when it cannot be one, or cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} must be a folder, or one that can be made: {error.strerror}") from error


def check_file(out: Path) -> None:
    """Make the folder of the file where results go. Raises ConfigError when the file cannot be written there."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} must be a file that can be written: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one rename: a reader meets the old text or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Where a benchmark's result goes: to standard output, and to a file where one was named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Print one JSON object, and write it to `out`, whose folder is made."""
    print(json.dumps(result, indent=1))
    write_result(result, out)


def write_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Write what is known so far to `out`, if there is one: a long benchmark may be cut short."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

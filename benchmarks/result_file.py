"""How a benchmark ends: its result on standard output, and in a file where one was named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Print one JSON object, and write it to `out`, whose folder is made."""
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")

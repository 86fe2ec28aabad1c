"""A result: what was measured, in one envelope that says by which commit, command, device and versions, and when."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def print_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Print one JSON object, and write it to `out`, whose folder is made."""
    print(json.dumps(envelope() | dict(result), indent=1))
    write_result(result, out)


def write_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Write what is known so far to `out`, if there is one: a long benchmark may be cut short."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(envelope() | dict(result), indent=1) + "\n", encoding="utf-8")


def envelope() -> dict[str, Any]:
    """What every result says about itself. `commit` ends in "+" where files differ from it, and is null outside a clone."""
    import torch

    from draftkit import __version__
    from draftkit.evaluate.run import device_name

    device = torch.device("cuda") if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {
        "commit": _commit(),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device_name(device),
        "versions": {"python": platform.python_version(), "draftkit": __version__} | versions,
    }


def _program() -> str:
    path = Path(sys.argv[0])
    folder = path.parent.name
    return f"python -m {folder}.{path.stem}" if folder in ("benchmarks", "checks") else path.name


def _commit() -> str | None:
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")

"""The command that comes next, as it can be typed in the reader's shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def program() -> str:
    """How draftkit is called from this shell, where its virtual environment may not be active."""
    if shutil.which("draftkit"):
        return "draftkit"
    beside = Path(sys.executable).with_name("draftkit")
    return shlex.quote(str(beside)) if beside.exists() else f"{shlex.quote(sys.executable)} -m draftkit"


def following(command: str, recipe: str = "", overrides: Sequence[str] | None = None) -> str:
    """`draftkit COMMAND`, with the recipe and the overrides that this command was given."""
    chosen = ["-r", recipe] if recipe and recipe != "tiny-dspark" else []
    for override in overrides or ():
        chosen += ["--set", override]
    return " ".join([program(), command, *map(shlex.quote, chosen)])

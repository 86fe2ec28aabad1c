"""What to type: the name or the folder that was probably meant, and the command that comes next."""

from __future__ import annotations

import difflib
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean train?"` for the known name that is most alike, nothing where none is alike."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def nearest_path(path: Path) -> str:
    """The same for a path: the first part of it that is missing is replaced by what lies there under a
    similar name."""
    given = [path, *path.parents]
    missing = next((p for p in reversed(given) if not p.exists()), None)
    if missing is None or not missing.parent.is_dir():
        return ""
    found = difflib.get_close_matches(missing.name, [p.name for p in missing.parent.iterdir()], 1)
    if not found:
        return ""
    meant = missing.parent / found[0] / path.relative_to(missing)
    return f"; did you mean {meant}?" if meant.exists() else f"; did you mean {missing.parent / found[0]}?"


def looks_like_path(name: str) -> bool:
    """Whether a name is one of a place on this machine rather than of a model on a hub ("owner/name")."""
    first, slash, _ = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return is_path or bool(slash and Path(first).exists())


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

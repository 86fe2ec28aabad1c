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
    similar name; a common ending alone makes none alike."""
    given = [path, *path.parents]
    missing = next((p for p in reversed(given) if not p.exists()), None)
    if missing is None or not missing.parent.is_dir():
        return ""
    there = [p.name for p in missing.parent.iterdir() if _alike(p.stem, missing.stem)]
    found = difflib.get_close_matches(missing.name, there, 1)
    if not found:
        return ""
    meant = missing.parent / found[0] / path.relative_to(missing)
    return f"; did you mean {meant}?" if meant.exists() else f"; did you mean {missing.parent / found[0]}?"


def _alike(one: str, other: str) -> bool:
    return bool(difflib.get_close_matches(one, [other]))


def nearest_key(name: str, known: Iterable[str]) -> str | None:
    """The key of a recipe that was probably meant: alike as a whole, by the first letters of its words
    (learning_rate: lr), or one that has a word of it."""
    keys = list(known)
    if found := difflib.get_close_matches(name, keys, 1):
        return found[0]
    words = name.split("_")
    if (letters := "".join(word[:1] for word in words)) in keys:
        return letters
    own = {word: key for key in reversed(keys) for word in key.split("_")}
    return next((own[f[0]] for w in words if (f := difflib.get_close_matches(w, own, 1, 0.8))), None)


def no_file(path: Path, give: str) -> str:
    """Why a path is no file, in words that follow it; `give` is what to give instead."""
    if path.is_dir():
        return f"is a folder; give {give}"
    return f"no such file{nearest_path(path) or f'; give {give}'}"


def no_folder(path: Path, give: str) -> str:
    """Why a path is no folder, in words that follow it; `give` is what to give instead."""
    if path.exists():
        return f"is a file; give {give}"
    return f"no such folder{nearest_path(path) or f'; give {give}'}"


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


# Sections of a recipe that a command does not read, because the stages before it have
_OVER = {
    "capture": ("generate",),
    "train": ("generate", "capture"),
    "evaluate": ("generate", "capture", "drafter", "train"),
    "profile": ("generate", "capture", "drafter", "train", "evaluate"),
}


def following(
    command: str, recipe: str = "", overrides: Sequence[str] | None = None, target: str | None = None
) -> str:
    """`draftkit COMMAND`, with what this one was given of recipe, target and overrides, and COMMAND reads."""
    chosen = ["-r", recipe] if recipe and recipe != "tiny-dspark" else []
    chosen += ["--target", target] if target else []
    for override in overrides or ():
        if override.partition(".")[0] not in _OVER.get(command.split()[0], ()):
            chosen += ["--set", override]
    return " ".join([program(), command, *map(shlex.quote, chosen)])

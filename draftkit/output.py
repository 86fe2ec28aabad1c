"""How results are written: a place that cannot take them is named before the work, files and folders are
replaced by renaming, and a disk that fails is told with the file's name."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from secrets import token_hex
from typing import Any, ParamSpec, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from draftkit.errors import ConfigError, DataError
from draftkit.permissions import follow_umask

P = ParamSpec("P")
T = TypeVar("T")


def check_kind(out: Path, folder: bool) -> None:
    """Raise ConfigError where a file stands in the place of a folder, or a folder in that of a file."""
    if out.is_file() and folder:
        raise ConfigError(f"--out {out} is a file; give the name of a folder")
    if out.is_dir() and not folder:
        raise ConfigError(f"--out {out} is a folder; give the name of a file")


def make_folder(out: Path) -> None:
    """Make the folder where results go. Raises ConfigError when it cannot be one, or cannot be written to."""
    check_kind(out, folder=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {out} must be a folder, or one that can be made: {error.strerror}"
        ) from error


def check_free(out: Path, *names: str, overwrite: bool = False) -> None:
    """Raise ConfigError where `out`, a folder, holds one of these files or, without names, is there itself,
    unless it is to be overwritten."""
    there = [path for path in ([out / name for name in names] or [out]) if path.exists()]
    if there and not overwrite:
        raise ConfigError(f"--out {out}: {there[0]} is there; choose another place, or give --overwrite")


def check_file(out: Path) -> None:
    """Make the folder of the file where results go. Raises ConfigError when the file cannot be written
    there."""
    check_kind(out, folder=False)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} must be a file that can be written: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one rename: a reader meets the old text or the new one, never half of one.

    Raises OSError that names the file when the disk does not take it.
    """
    partial = path.with_name(f"{path.name}.{token_hex(4)}.partial")  # processes that write one file at once
    with naming(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_tensors(
    path: Path,
    tensors: dict[str, Any],
    save_file: Callable[..., None],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file by the `save_file` for this kind of tensors, as readable as other files.

    Raises OSError that names the file when the disk does not take it.
    """
    with naming(path):
        save_file(tensors, path, metadata)
        follow_umask(path)


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure of matplotlib's as PNG, in one rename. Raises OSError that names the file."""
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        figure.savefig(partial, dpi=dpi, format="png")
        partial.replace(path)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other runs from `path`, a file or a folder that is there, for as long as this one writes it; a
    killed run's lock is released by the system.

    Raises DataError when another run has it, OSError that names it when the disk does not take the lock's
    file. A file system without locks keeps nobody out.
    """
    lock = FileLock(path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        with naming(path):
            lock.acquire()
    except Timeout as error:
        raise DataError(
            f"{path}: another run is writing it; wait for its end or choose another place"
        ) from error
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        lock.release()


def lock_of(path: Path) -> FileLock | None:
    """A lock that no other process holds, held; None when one does. The system takes it away from a process
    that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def one_writer(file: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a stage that makes its folder `out` (or, with `file`, the folder of its file `out`): other
    runs are kept from it until the stage ends. Of several processes of one run (torchrun) the first one has
    the lock."""

    def decorate(stage: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(stage)

        @wraps(stage)
        def alone(*args: P.args, **kwargs: P.kwargs) -> T:
            out: Path = signature.bind(*args, **kwargs).arguments["out"]
            folder = out.parent if file else out
            if os.environ.get("RANK", "0") != "0":
                return stage(*args, **kwargs)
            with naming(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with only_writer(folder):
                return stage(*args, **kwargs)

        return alone

    return decorate


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file the disk did not take, and what to do: a write that fails does not know the name of its
    file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, Timeout):  # of a lock, which is no fault of the disk's
            raise
        why = getattr(error, "strerror", None) or error
        raise OSError(
            f"{path}: cannot be written ({why}); make room or choose another place, and run it again"
        ) from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def swap_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in the place of another: `newest_folder` finds one of the two after a kill at any
    moment."""
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def newest_folder(folder: Path) -> Path | None:
    """The folder, or what it was before a swap that was killed half way; None when there is neither."""
    return next((place for place in (folder, _old(folder)) if place.exists()), None)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


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

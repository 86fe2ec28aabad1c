"""Builds the sources in `draftkit/cpp` with the compiler that is there, once per machine, into the user's
cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger("draftkit.engine")
SOURCES = Path(__file__).parent.parent / "cpp"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-Wl,--as-needed",
)


class NoNative(Exception):
    """Why a C++ function cannot be used here; the PyTorch operations go on."""


def library_names() -> list[str]:
    """What there is to compile: "step" for the engine, "training" for the trainer."""
    return sorted(path.stem for path in SOURCES.glob("*.cpp"))


def load_library(name: str) -> ctypes.CDLL:
    """A compiled source, from the user's cache or built now (seconds). Raises NoNative."""
    source = SOURCES / f"{name}.cpp"
    compiler = next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))),
        None,
    )
    if compiler is None:
        raise NoNative("no C++ compiler found (g++, clang++ or $CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    # torch's own threads, not a second pool
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))[:1]
    command = [compiler, *_FLAGS, str(source), *map(str, openmp)]
    parts = [
        *(path.read_text("utf-8") for path in (source, *sorted(SOURCES.glob("*.h")))),
        version,
        _processor(),
        *command,
    ]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftkit"
    except RuntimeError as error:
        raise NoNative(f"no cache folder ({error}); set XDG_CACHE_HOME") from error
    library = folder / f"{name}-{key[:20]}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        if not library.exists():
            _build(command, library)
        _check_owner(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NoNative(f"{library}: {error}") from error


def _check_owner(path: Path) -> None:
    """Raise NoNative unless what will be run is this user's (or root's), and nobody else can write it."""
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoNative(
            f"{path}: belongs to another user, or others can write it; remove it, or set XDG_CACHE_HOME"
        )


def structure(*fields: tuple[str, object]) -> type[ctypes.Structure]:
    """A C structure from (names, type) pairs; the order is that of the source."""
    flat = [(name, kind) for names, kind in fields for name in names.split()]
    return type("Structure", (ctypes.Structure,), {"_fields_": flat})


def _build(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        log.info("compiling %s, once for this machine", library.name.split("-")[0])
        run = subprocess.run([*command, "-o", str(made)], stderr=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            raise NoNative(f"{command[0]} failed: {(run.stderr.strip().splitlines() or ['no message'])[0]}")
        made.chmod(0o644)  # whatever the umask says
        made.replace(library)  # several processes may build at once


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    telling = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), *telling[:2]])

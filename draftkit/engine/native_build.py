"""Builds the C++ pass with the compiler that is there, once per machine and source, into the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_FOLDER = Path(__file__).with_name("cpp")
_SOURCES = (_FOLDER / "step.cpp", *sorted(_FOLDER.glob("*.h")))
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-fopenmp", "-Wl,--as-needed")


class NoNative(Exception):
    """Why the C++ pass cannot be used here; the PyTorch operations go on."""


def load_library() -> ctypes.CDLL:
    """The compiled source, from the user's cache or built now (seconds). Raises NoNative."""
    compiler = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise NoNative("no C++ compiler found (g++, clang++ or $CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))[:1]  # torch's own threads, not a second pool
    command = [compiler, *_FLAGS, str(_SOURCES[0]), *map(str, openmp)]
    parts = [*(source.read_text("utf-8") for source in _SOURCES), version, _processor(), *command]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftkit"
    library = folder / f"step-{key[:20]}.so"
    try:
        if not library.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _build(command, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NoNative(f"{library}: {error}") from error


def _build(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoNative(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        made.replace(library)  # several processes may build at once


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    telling = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), *telling[:2]])

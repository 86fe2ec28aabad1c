"""Where a benchmark's result goes: to standard output, and to a file where one was named; and what made
it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Print one JSON object, and write it to `out`, whose folder is made."""
    print(json.dumps({"made": envelope()} | dict(result), indent=1))
    write_result(result, out)


def write_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Write what is known so far to `out`, if there is one: a long benchmark may be cut short."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"made": envelope()} | dict(result), indent=1) + "\n", encoding="utf-8")


def envelope() -> dict[str, Any]:
    """Commit (with "+" where files differ from it), command, date, device, machine and versions of a
    result."""
    import torch
    import transformers

    folder, program = Path(__file__).parent, Path(sys.argv[0])
    commit = _git(folder, "rev-parse", "--short", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit + ("+" if changed else ""),
        "command": shlex.join(["python", "-m", f"{program.parent.name}.{program.stem}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": _machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and the widest vector instructions among those that change
    our kernels."""
    from draftkit.evaluate.run import device_name

    info = Path("/proc/cpuinfo")
    flags = set(info.read_text("utf-8").split()) if info.exists() else set()
    widest = next((n for n in ("avx512_bf16", "avx512f", "avx2") if n in flags), "unknown")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": device_name(), "cores": cores, "instructions": widest}


def _git(folder: Path, *arguments: str) -> str:
    """What git says, nothing where there is no repository."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""

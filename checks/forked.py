"""Commands of draftkit as processes that begin at once: forked from one that has imported everything, so
that dozens of them can be killed, or be given a disk that is full or read-only, in the time of a few
ordinary starts."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "draftkit.cli",
    "draftkit.quickstart",
    "draftkit.schedule_stages",
    "draftkit.serve.server",
    "matplotlib.figure",
]
_CONTEXT.set_forkserver_preload(_IMPORTED)
_STARTED: list[BaseProcess] = []
_IN_ORDER = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes
_DAC_OVERRIDE, _CAPABILITIES_3 = 1, 0x20080522  # linux/capability.h


@dataclass(frozen=True)
class Disk:
    """How the disk is to be. `most_bytes`: no file may grow beyond this; with `deadly` the system ends the
    process in the middle of the write that would, else the write fails as on a full disk. `keeps_out`:
    permissions count, for root too."""

    most_bytes: int | None = None
    deadly: bool = False
    keeps_out: bool = False


def start(
    command: Sequence[str],
    log: Path,
    disk: Disk | None = None,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    program: Callable[[], None] | None = None,
) -> BaseProcess:
    """Begin `draftkit COMMAND...`, or another program with these arguments; what it prints goes to `log`.
    `before` is called there first. `environment`: variables beside those of this process; what is read
    while PyTorch is imported, as OMP_NUM_THREADS, is as it was when the first process began. It ends with
    this process at the latest."""
    variables = {**os.environ, **(environment or {})}
    process = _CONTEXT.Process(
        target=_run, args=(list(command), log, disk or Disk(), before, variables, program)
    )
    process.start()
    _STARTED.append(process)
    return process


@atexit.register  # before multiprocessing waits for them, which a stopped one would never end
def _end_all() -> None:
    for process in _STARTED:
        process.kill()


def finished(command: Sequence[str], log: Path, disk: Disk | None = None) -> tuple[int, str]:
    """Its exit code (negative: the signal that ended it) and what it printed."""
    process = start(command, log, disk)
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text("utf-8", "replace")


class Ranks:
    """`draftkit COMMAND...`, or another program, in several processes that are one run, with what torchrun
    tells them (RANK, WORLD_SIZE, where they meet); one alone is told nothing. What each prints goes to a file
    of its own, named after `log`."""

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        log: Path,
        before: Callable[[], None] | None = None,
        program: Callable[[], None] | None = None,
    ) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
        meet |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        meet |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        self._logs = [log.with_name(f"{log.name}-{rank}") for rank in range(count)]
        told = [
            meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)
        ]
        self.processes = [
            start(command, path, None, before, environment, program)
            for path, environment in zip(self._logs, told, strict=True)
        ]

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for process in self.processes if process.pid is not None]

    def finish(self) -> list[tuple[int, str]]:
        """The exit code and the output of each. One that fails ends the others, which would wait for it."""
        running = self.processes
        while running:
            connection.wait([process.sentinel for process in running])
            running = [process for process in self.processes if process.exitcode is None]
            if any(process.exitcode not in (None, *_IN_ORDER) for process in self.processes):
                for process in running:
                    process.kill()
        codes = [process.exitcode for process in self.processes]
        return [
            (code or 0, path.read_text("utf-8", "replace"))
            for code, path in zip(codes, self._logs, strict=True)
        ]


def _run(
    command: list[str],
    log: Path,
    disk: Disk,
    before: Callable[[], None] | None,
    environment: Mapping[str, str],
    program: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    missing = set(_IMPORTED) - set(sys.modules)
    assert not missing, f"could not be imported before: {missing}"  # which multiprocessing passes over
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(s), "w", buffering=1) for s in (1, 2))
    if disk.keeps_out:
        _obey_permissions()
    if disk.most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if disk.deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk.most_bytes, disk.most_bytes))
    if before is not None:
        before()
    from draftkit.cli import main

    sys.argv = ["draftkit", *command]
    (program or main)()


def _obey_permissions() -> None:
    """Give up the right to write where permissions say no, which root has."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable of the first 32, then of the others
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(1 << _DAC_OVERRIDE)
    sets[1] &= ~(1 << _DAC_OVERRIDE)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")

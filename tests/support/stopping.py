"""Commands that stop or end themselves in the middle of their work, wherever the test is at that moment.

`python tests/support/stopping.py PLACE COUNT COMMAND...` runs `draftkit COMMAND...`, which stops (SIGSTOP)
after so many calls of a function, as "draftkit.data.parts:Part.add".
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.patience import wait_until

SCRIPT = str(Path(__file__))
RECORDS = "draftkit.features.writer:StoreWriter.add"
ANSWERS = "draftkit.data.parts:Part.add"
STATES = "draftkit.train.trainer:save_state"


def signal_at(place: str, count: int, number: signal.Signals = signal.SIGSTOP, before: bool = False) -> None:
    """From now on this process gets the signal after, or before, so many calls of a function."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function, numbers = getattr(owner, name), itertools.count(1)

    def counted(*given: Any, **named: Any) -> Any:
        now = next(numbers) == count
        if now and before:
            os.kill(os.getpid(), number)
        made = function(*given, **named)
        if now and not before:
            os.kill(os.getpid(), number)
        return made

    setattr(owner, name, counted)


def wait_for_stop(*processes: int) -> None:
    """Until these processes have stopped; it fails when one has ended."""
    ends = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    for pid in processes:
        wait_until(lambda pid=pid: _status(pid) in ends, f"the place where process {pid} stops")
        assert _status(pid) == psutil.STATUS_STOPPED, f"process {pid} ended before it came to where it stops"


def let_go(processes: Sequence[int], number: signal.Signals) -> None:
    """Let stopped processes go on, once somebody has sent them this signal."""
    for pid in processes:
        wait_until(lambda pid=pid: _pending(pid) >> (number - 1) & 1, f"{number.name} for {pid}")
    for pid in processes:
        os.kill(pid, signal.SIGCONT)


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def _pending(pid: int) -> int:
    """The signals that a process has been sent and has not taken, as bits."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("ShdPnd")), 16)


if __name__ == "__main__":
    signal_at(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    from draftkit.cli import main

    main()

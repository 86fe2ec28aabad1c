"""How long tests wait. Machines are slow and others use them: a wait for what will happen may be long, since
it ends when it has happened. Nothing is asked of how long anything took."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 300.0  # seconds


def wait_until(condition: Callable[[], object], what: str = "it") -> None:
    """Look until the condition holds, at first every few milliseconds; it fails when PATIENCE is over."""
    until, pause = time.monotonic() + PATIENCE, 0.002
    while not condition():
        assert time.monotonic() < until, f"{what} has not come about in {PATIENCE:.0f} s"
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05)  # looking takes time from what is waited for

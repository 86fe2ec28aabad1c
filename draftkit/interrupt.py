"""Ctrl-C and SIGTERM end a stage in the same orderly way: what is finished is kept, and the exit code says which."""

from __future__ import annotations

import signal
from types import FrameType

from draftkit.errors import Interrupted


def raise_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise `Interrupted` in the main thread, with exit codes 130 and 143."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second signal ends the process at once
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Interrupted(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

"""Ctrl-C and SIGTERM end a stage in the same orderly way: what is finished is kept, and the exit code says
which."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Within, the first SIGINT or SIGTERM is only noted: the given function returns its exit code (130, 143),
    or 0.

    The loop inside asks at a good moment, ends, and raises `Interrupted`; so does this at its end, for a
    signal that came too late to be asked about. A second signal ends the process at once. Outside the main
    thread, which alone gets signals, nothing changes.
    """
    code = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal code
        code = 128 + number
        for name in before:
            signal.signal(name, signal.SIG_DFL)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: code
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if code:
        raise Interrupted(code)

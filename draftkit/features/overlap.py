"""Writing what the target has read while it reads the next texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

WAITING = 2  # batches that are read and not yet written
T = TypeVar("T")


class WriterThread:
    """Runs jobs in one thread, in their order. After one that failed none runs; its error is raised by the
    next `put`, or by `drain`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "feature-writer")
        self._waiting: deque[Future[None]] = deque()
        self._streams: dict[torch.device, Any] = {}
        self._failed = False

    def __enter__(self) -> WriterThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def put(self, device: torch.device, encode: Callable[[], T], write: Callable[[T], None]) -> None:
        """Write what `encode` makes of tensors on `device`; wait while WAITING others do.

        On a GPU the thread encodes, in a stream of its own: copies wait for the passes before them alone.
        Elsewhere the caller does: on a CPU a second thread would start a second team of OpenMP threads.
        """
        while self._waiting and (len(self._waiting) >= WAITING or self._waiting[0].done()):
            self._waiting.popleft().result()
        if device.type != "cuda":
            encoded = encode()
            self._waiting.append(self._pool.submit(self._run, lambda: write(encoded)))
            return
        in_turn = self._after_this(device)

        def encode_and_write() -> None:
            with in_turn():
                encoded = encode()
            write(encoded)

        self._waiting.append(self._pool.submit(self._run, encode_and_write))

    def drain(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def _after_this(self, device: torch.device) -> Callable[[], Any]:
        """A context whose operations come after those that the caller has given the device until now, and
        wait for none of the later ones."""
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))

        def in_turn() -> Any:
            stream.wait_event(ready)
            return torch.cuda.stream(stream)

        return in_turn

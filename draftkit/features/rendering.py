"""Rendering conversations in worker processes, so that long inputs do not wait for one core's tokenizer."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from threading import Thread
from types import TracebackType
from typing import Any

from draftkit.errors import FeatureStoreError
from draftkit.features.texts import Chunk, PartTexts, rendered
from draftkit.settings import CaptureSettings
from draftkit.target.interface import TargetInfo
from draftkit.target.prompt_format import PromptFormat

ALONE = 8  # chunks that are rendered here before workers start: theirs takes seconds, a chunk far less
MOST = 8  # workers: one process writes no more than they render


class Rendering:
    """Renders chunks for `capture`: the first ALONE here, later ones in worker processes where there are
    cores for them. `ahead` is how many may be asked for before the first of them is taken."""

    def __init__(self, prompt_format: PromptFormat, info: TargetInfo, settings: CaptureSettings) -> None:
        self._prompt_format, self._info, self._settings = prompt_format, info, settings
        self._pool: ProcessPoolExecutor | None = None
        self._asked = 0
        self._workers = workers_here()

    def __enter__(self) -> Rendering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @property
    def ahead(self) -> int:
        """0 while this process renders: a chunk is rendered when it is taken."""
        return 0 if self._pool is None else self._workers

    def ask(self, chunk: Chunk) -> Callable[[], PartTexts]:
        """What gives the chunk's texts, or raises the error that rendering one of its conversations did.
        Raises FeatureStoreError when a worker was ended from outside."""
        self._asked += 1
        if self._pool is None and self._asked > ALONE and self._workers:
            self._pool = self._started()
        if self._pool is None:
            return lambda: rendered(chunk, self._prompt_format, self._info, self._settings)
        with _naming_ended_workers():
            future = self._pool.submit(_rendered, chunk)

        def taken() -> PartTexts:
            with _naming_ended_workers():
                return future.result()

        return taken

    def _started(self) -> ProcessPoolExecutor:
        shown = self._prompt_format
        form = type(shown), shown.tokenizer, shown.switches, shown.today
        spawn = multiprocessing.get_context("spawn")  # threads and a GPU's state do not survive a fork
        about = form, self._info, self._settings
        return ProcessPoolExecutor(self._workers, spawn, initializer=_begin, initargs=about)


def workers_here() -> int:
    """Worker processes for this process: its share of the cores that it may use, without its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


@contextmanager
def _naming_ended_workers() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        told = "a process that rendered conversations was ended (too little memory?)"
        raise FeatureStoreError(f"{told}; run the same command again to go on") from error


_about: list[Any] = []  # of a worker: prompt format, target, settings


def _begin(
    form: tuple[Any, Any, Any, Any], info: TargetInfo, settings: CaptureSettings
) -> None:  # in a worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    Thread(target=_end_with_parent, daemon=True).start()
    kind, *made_of = form
    _about[:] = kind(*made_of), info, settings


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _rendered(chunk: Chunk) -> PartTexts:
    return rendered(chunk, *_about)

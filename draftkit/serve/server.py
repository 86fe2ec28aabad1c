"""The server process: socket, signals, drain, exit code."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from draftkit.engine.settings import EngineSettings
from draftkit.errors import DraftkitError, ServeError
from draftkit.serve.activity import ActivityLog
from draftkit.serve.app import create_app
from draftkit.serve.connections import IDLE_SECONDS, protocol_for
from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.metrics import ServerMetrics
from draftkit.serve.problem import ApiError
from draftkit.serve.settings import ServeSettings, option_names
from draftkit.serve.worker import Served, Worker

log = logging.getLogger("draftkit.serve")
_FLUSH_SECONDS = 10  # at most, for responses that are made but not yet sent when the last answer is complete
_CUT_SECONDS = 1  # at most, for what those are told whose answers are cut off
# threads that tokenise and check bodies give way to the event loop sooner than Python's 0.005
SWITCH_SECONDS = 0.002
KEPT_FILES = 128  # for everything but connections
_FILES = 65_536  # connections that may be open at the same time, where the system lets us have so many


def load_served(
    target: str,
    drafter: str | None,
    name: str | None,
    settings: EngineSettings,
    threads: int | None = None,
    step_rate: Path | None = None,
    calibration: Path | None = None,
    generation_config: str = "auto",
    honour_special_tokens: bool = False,
    template_switches: Mapping[str, Any] | None = None,
) -> Served:
    """The engine and tokenizer of a target; slow, runs in the engine's thread. Raises DraftkitError, also for
    template switches that the chat template does not know."""
    import torch

    from draftkit.serve.pair import PlanFiles, open_pair
    from draftkit.serve.sampling_defaults import sampling_defaults

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with option_names():
            engine, tokenizer = open_pair(target, drafter, settings, PlanFiles(step_rate, calibration))
    except MemoryError as error:
        told = (
            f"{error}; give a --max-running below {settings.max_running}, or a smaller --max-length or target"
        )
        raise ServeError(f"memory does not hold this server: {told}") from error
    defaults = sampling_defaults(target) if generation_config == "auto" else {}
    texts = TokenTexts(tokenizer)
    known = name or engine.info.name
    served = Served(engine, tokenizer, texts, known, defaults, honour_special_tokens, template_switches or {})
    served.prompt_format.check_switches(served.template_switches)
    gc.collect()
    # to go over all that is loaded takes Python a quarter of a second, in which nobody would get a token
    gc.freeze()
    return served


def run_server(load: Callable[[], Served], settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT; returns after a drain. Raises DraftkitError when it cannot bind, load or
    go on.

    The first signal lets running requests finish (new ones get 503) for at most `drain_seconds`; a second one
    ends all.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    files = _raise_file_limit()
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.getLogger("asyncio").addFilter(_OutOfFiles())
    bound = _bind(settings.host, settings.port)
    metrics = ServerMetrics()
    worker = Worker(load, metrics, settings.max_waiting)
    config = uvicorn.Config(
        create_app(worker, metrics, settings),
        log_config=None,
        access_log=False,
        server_header=False,
        http=protocol_for(min(settings.max_connections, max(files - KEPT_FILES, files // 4))),
        timeout_keep_alive=IDLE_SECONDS,
    )
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("listening on http://%s:%d (loading the model)", shown, port)
    server = _Server(config, worker, metrics, settings.drain_seconds)
    try:
        asyncio.run(server.serve(sockets=[bound]))
    finally:
        bound.close()
    # in the middle of loading, which nothing can interrupt: the interpreter's own end would abort there
    if worker.alive:
        log.warning("ending before the model was loaded")
        logging.shutdown()
        os._exit(0)
    if worker.failure is not None:
        if isinstance(worker.failure, DraftkitError):
            raise worker.failure
        raise ServeError(
            f"the engine stopped: {worker.failure!r}; the log above says where"
        ) from worker.failure


def _raise_file_limit() -> int:
    """A connection is a file, and shells often allow no more than 1,024: how many there may be now."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # systems with a limit that they do not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _FILES if soft == resource.RLIM_INFINITY else soft


class _OutOfFiles(logging.Filter):
    """One line in ten seconds about connections that cannot be taken; asyncio writes thousands of
    tracebacks."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if "out of system resource" not in record.getMessage():
            return True
        record.exc_info, told, now = None, self._last, time.monotonic()
        if now - told < 10:
            return False
        self._last = now
        record.msg, record.args = "no connection can be taken: too many open files; raise `ulimit -n`", ()
        return True


def _bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises ServeError when the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)  # who comes early waits instead of being refused
    except (OSError, UnicodeError) as error:
        code, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        option = "--port" if code in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise ServeError(f"cannot listen on {host}:{port}: {reason}; choose another {option}") from error
    return bound


class _Server(uvicorn.Server):
    """Uvicorn, but a signal drains instead of closing the door on running requests, and the exit code is
    0."""

    def __init__(
        self, config: uvicorn.Config, worker: Worker, metrics: ServerMetrics, drain_seconds: float
    ) -> None:
        super().__init__(config)
        self._worker, self._metrics = worker, metrics
        self._activity: ActivityLog | None = None  # once the model is loaded
        self._drain_seconds = drain_seconds
        self._signals = 0
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count signals; `on_tick` acts on them in the event loop."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: has the time come to end?"""
        worker = self._worker
        if worker.state == "ready":
            self._tell(worker.ready())
        if self._signals and self._deadline is None:
            self._deadline = time.monotonic() + self._drain_seconds
            worker.drain()
            log.info("shutting down: %d answers to finish", worker.in_flight)
        left = math.inf if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0 or self._signals > 1:
            if worker.in_flight:
                log.warning("ending with %d unfinished answers", worker.in_flight)
            worker.end_all(
                ApiError(503, "the server ends before this answer is complete; send the request elsewhere")
            )
            self._end(_CUT_SECONDS)
        elif worker.state == "failed" or (self._deadline is not None and not worker.in_flight):
            self._end(min(left, _FLUSH_SECONDS))
        return await super().on_tick(counter)

    def _tell(self, served: Served) -> None:
        """What the log says of a server that is up: its model once, then what it does."""
        now, engine = time.monotonic(), served.engine
        if self._activity is None:
            log.info("serving %s", served.name)
            self._activity = ActivityLog(engine.info.gamma)
        if self._activity.due(now):
            self._activity.look(now, self._metrics.generated, engine.metrics)

    def _end(self, flush_seconds: float) -> None:
        """Close, once what is made is sent or so many seconds have passed; who has not read it by then is cut
        off."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # our log has a line for each of these
        self.config.timeout_graceful_shutdown = math.ceil(flush_seconds)
        self.should_exit = True

"""The real application and HTTP in a thread of the test's process, over the stand-in engine: a process for
each chat template would take minutes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from draftkit.serve.app import create_app
from draftkit.serve.metrics import ServerMetrics
from draftkit.serve.settings import ServeSettings
from draftkit.serve.worker import Worker
from support.fake_engine import TEXT, fake_served
from support.patience import PATIENCE, wait_until
from support.templates import FAMILIES, MARKS


@contextmanager
def answering(
    family: str,
    text: str = TEXT,
    settings: ServeSettings | None = None,
    breaks: threading.Event | None = None,
    template: str | None = None,
    **switches: Any,
) -> Iterator[str]:
    """The URL of a server of a family's template (or of another one, "" for none) that says `text` to
    everybody; after three steps its engine waits for `breaks`, where it is given, and breaks."""
    shown = FAMILIES[family].template if template is None else template
    served = fake_served(text=text, template=shown, marks=MARKS, switches=switches)
    served.tokenizer.chat_template = shown or None
    if breaks is not None:
        served.engine.step = _breaking(served.engine.step, breaks)
    metrics = ServerMetrics()
    app = create_app(Worker(lambda: served, metrics, 64), metrics, settings or ServeSettings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(trust_env=False, timeout=PATIENCE) as http:
            wait_until(lambda: http.get(f"{url}/ready").status_code == 200)
        yield url
    finally:
        server.should_exit = True
        thread.join()


def _breaking(step: Callable[[], list[Any]], breaks: threading.Event) -> Callable[[], list[Any]]:
    left = iter(range(3))

    def limited() -> list[Any]:
        if next(left, None) is None:
            breaks.wait(PATIENCE)
            raise RuntimeError("the engine breaks")
        return step()

    return limited

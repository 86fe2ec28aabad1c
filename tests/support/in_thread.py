"""The real application and HTTP in a thread of the test's process, over the stand-in engine: a process for
each chat template would take minutes."""

from __future__ import annotations

import threading
import time
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
from support.templates import FAMILIES, MARKS


@contextmanager
def answering(
    family: str,
    text: str = TEXT,
    settings: ServeSettings | None = None,
    breaks_after: int | None = None,
    template: str | None = None,
    **switches: Any,
) -> Iterator[str]:
    """The URL of a server of a family's template (or of another one, "" for none) that says `text` to
    everybody; its engine breaks after so many steps."""
    shown = FAMILIES[family].template if template is None else template
    served = fake_served(text=text, template=shown, marks=MARKS, switches=switches)
    served.tokenizer.chat_template = shown or None
    if breaks_after is not None:
        served.engine.step = _breaking(served.engine.step, breaks_after)
    metrics = ServerMetrics()
    app = create_app(Worker(lambda: served, metrics, 64), metrics, settings or ServeSettings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        while httpx.get(f"{url}/ready", trust_env=False).status_code != 200:
            time.sleep(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join()


def _breaking(step: Callable[[], list[Any]], after: int) -> Callable[[], list[Any]]:
    left = iter(range(after))

    def limited() -> list[Any]:
        if next(left, None) is None:
            raise RuntimeError("the engine breaks")
        time.sleep(0.05)  # what was made before is sent before
        return step()

    return limited

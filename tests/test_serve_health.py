"""While each field of the API is filled to its cap, little is read on the event loop and little is tokenised
in all, so that /health and everybody else is answered meanwhile; and a signal is taken. How long /health
takes is measured by `checks/full_fields.py`."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from checks.full_fields import BODY, CASES, COMPLETIONS, LONG_TEXT, N, PeakMemory
from draftkit.serve.stream import LONG
from support.patience import PATIENCE, wait_until
from support.server import Server, serving

SUPPORT = Path(__file__).parent / "support"
MOST_MEMORY = 100 * 2**20  # bytes that a body of 8 MiB may take over what there was
MOST_TOKENISED = 2**21  # characters or tokens, for one request


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server notes what it reads."""
    return tmp_path_factory.mktemp("work") / "notes"


@pytest.fixture(scope="module")
def server(notes: Path) -> Iterator[Server]:
    command = (sys.executable, str(SUPPORT / "counted_work.py"), str(notes))
    with serving("--max-body-bytes", str(BODY), command=command) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "name", "body"), CASES, ids=[f"{path[1:]}-{name}" for path, name, _ in CASES]
)
def test_a_full_field_keeps_nobody_waiting(
    server: Server, notes: Path, path: str, name: str, body: dict[str, Any]
) -> None:
    raw = json.dumps(body, separators=(",", ":")).encode()[: BODY + 1]
    notes.write_text("")
    before, peak = psutil.Process(server.process.pid).memory_info().rss, PeakMemory(server.process.pid)
    answer = server.http.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 413) and len(answer.content) < 2**27
    assert peak.above(before) <= MOST_MEMORY or len(raw) < BODY // 2
    work = [line.split() for line in notes.read_text().splitlines()]
    on_the_loop = [int(size) for where, _, size in work if where == "loop"]
    read = len(raw) if work and answer.status_code != 413 else 0
    assert sum(on_the_loop) < 4 * LONG, on_the_loop
    assert sum(int(size) for _, _, size in work) <= read + MOST_TOKENISED
    prepared = {where for where, name, _ in work if name == "_prepared"}
    assert "loop" not in prepared or len(raw) < LONG
    assert prepared or answer.status_code != 200 or "tokenize" in path


@pytest.mark.slow
def test_others_are_answered_while_a_body_is_being_read_and_a_signal_is_taken(tmp_path: Path) -> None:
    """Reading takes for ever here, as long as a file is there."""
    hold = tmp_path / "hold"
    hold.touch()
    code = (
        "import logging, sys, time; from pathlib import Path\n"
        f"sys.path.insert(0, {str(SUPPORT.parent)!r})\n"
        "from draftkit.serve import generate\n"
        "from support.fake_engine import main\n"
        "prepared = generate._prepared\n"
        "def slowly(body, *rest):\n"
        "    if body.bad_words:\n"
        "        logging.getLogger('draftkit.serve').info('reading')\n"
        f"        while Path({str(hold)!r}).exists(): time.sleep(0.005)\n"
        "    return prepared(body, *rest)\n"
        "generate._prepared = slowly\n"
        "main()"
    )
    with serving("--max-body-bytes", str(BODY), command=(sys.executable, "-c", code)) as server:
        body = {"prompt": LONG_TEXT[:100_000], "n": N, **COMPLETIONS["bad_words"]}
        statuses: list[int] = []
        thread = threading.Thread(
            target=lambda: statuses.append(server.http.post("/v1/completions", json=body).status_code)
        )
        thread.start()
        server.logged("reading")
        assert server.http.get("/health").status_code == 200
        assert server.http.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        server.logged("shutting down")
        assert statuses == []
        hold.unlink()
        thread.join()
        wait_until(lambda: server.process.poll() is not None)
        assert statuses == [400] and server.process.wait(PATIENCE) == 0

"""Progress where there is no terminal: lines that move within seconds, with rates and what is left."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from draftkit import progress
from draftkit.progress import clock, doing, progress_bar


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.1)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)


def test_what_is_long_is_told_and_what_is_short_is_not(capsys: Any) -> None:
    with doing("loading"):
        time.sleep(0.3)
    with doing("blinking"):
        pass
    assert capsys.readouterr().err.splitlines() == ["loading ...", "loading: 0 s"]


def test_lines_come_by_themselves_and_say_what_is_left(capsys: Any) -> None:
    with progress_bar("generate", 8, "warming up") as bar:
        time.sleep(0.25)
        bar.update(advance=2, note="1,000 tokens")
        time.sleep(0.25)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and lines[0] == "generate 0/8, warming up, 0:00"
    assert re.fullmatch(r"generate 2/8, 1,000 tokens, 0:0\d, 0:0\d left", lines[-1])


def test_a_second_process_of_a_run_tells_nothing(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress_bar("train", 8) as bar:
        time.sleep(0.25)
        bar.update(advance=2)
    assert capsys.readouterr().err == ""


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_generate_moves_by_tokens_before_an_answer_is_finished(tmp_path: Path) -> None:
    """Redirected, with answers longer than the time between two lines."""
    out, told = tmp_path / "answers.jsonl", tmp_path / "log"
    command = [
        sys.executable,
        "-c",
        _FAST,
        "generate",
        "-o",
        str(out),
        "--set",
        "generate.max_new_tokens=400",
    ]
    with told.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 90
            while time.monotonic() < until and process.poll() is None:
                if found := re.findall(
                    r"generate 0/\d+, ([\d,]+) tokens.* at most \S+ left", told.read_text()
                ):
                    break
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    assert found and int(found[0].replace(",", "")) > 0


_FAST = "from draftkit import cli, progress; progress.QUIET = progress.LINE_EVERY = 0.05; cli.main()"

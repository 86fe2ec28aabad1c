"""Progress where there is no terminal: lines that move within seconds, with rates and what is left."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checks.forked import start
from draftkit import progress
from draftkit.progress import clock, doing, progress_bar
from support.patience import wait_until

NEVER = 1e6  # seconds


class Told:
    """What was written to standard error until now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._written = io.StringIO()
        monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=self._written))

    @property
    def lines(self) -> list[str]:
        return self._written.getvalue().splitlines()

    def wait_for(self, pattern: str) -> None:
        """Until a whole line is there that matches."""
        wait_until(lambda: any(re.fullmatch(pattern, line) for line in self.lines), f"{pattern!r}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def pace(monkeypatch: pytest.MonkeyPatch, quiet: float, line_every: float = NEVER) -> None:
    """Seconds without a word, and between lines."""
    monkeypatch.setattr(progress, "QUIET", quiet)
    monkeypatch.setattr(progress, "LINE_EVERY", line_every)


class Clock:
    """The time as `progress` reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_what_is_long_is_told_and_what_is_short_is_not(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    pace(monkeypatch, 0.01)
    with doing("loading"):
        told.wait_for(r"loading \.\.\.")
    pace(monkeypatch, NEVER)
    with doing("blinking"):
        pass
    assert len(told.lines) == 2 and re.fullmatch(r"loading: \d+ s", told.lines[1])


def test_lines_come_by_themselves_and_say_what_is_left(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    pace(monkeypatch, 0.01, 0.01)
    with progress_bar("generate", 8, "warming up") as bar:
        told.wait_for(r"generate 0/8, warming up, \d:\d\d")
        bar.update(advance=2, note="1,000 tokens")
        told.wait_for(r"generate 2/8, 1,000 tokens, \d:\d\d.*")
        bar.update(completed=8, note="4,000 tokens")
    assert re.fullmatch(r"generate 8/8, 4,000 tokens, \d:\d\d.*", told.lines[-1]), "and a last one"


def test_what_is_left_never_grows_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    count = progress._Count("train", 100, percent=True)
    clock.now += 8
    count.update(completed=50, note="step 11, 0.1 steps/s")
    lines = []
    for _ in range(6):
        lines.append(count.line())
        clock.now += 2
    passed = ("0:08, 0:08 left", "0:10, 0:06 left", "0:12, 0:04 left", "0:14, 0:02 left", "0:16", "0:18")
    assert lines == [f"train 50 %, step 11, 0.1 steps/s, {told}" for told in passed]


def test_a_part_has_its_own_name_count_and_clock(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    pace(monkeypatch, 0.01, 0.01)
    clock = Clock(monkeypatch)
    with progress_bar("train", 100, percent=True) as bar:
        bar.update(completed=90)
        clock.now += 60
        told.wait_for("train 90 %, 1:00")
        with bar.part("validate", 40) as part:
            clock.now += 5
            told.wait_for("validate 0/40, 0:05")
            part.update(completed=10)
            told.wait_for("validate 10/40, 0:05, 0:15 left")
        bar.update(completed=95)
        told.wait_for("train 95 %, 1:05, .*")


def test_a_rate_is_not_that_of_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    count = progress._Count("generate", 100, done=90)
    clock.now += 10
    count.update(advance=1)
    assert count.line() == "generate 91/100, 0:10, 1:30 left"  # nine times ten seconds


def test_a_terminal_shows_the_same(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("train", 100, percent=True) as bar:
        bar.update(completed=90, note="step 11")
        with bar.part("validate", 40) as part:
            part.update(advance=12)
    assert re.search(r"train .* 90 % step 11", capsys.readouterr().err)


def test_a_second_process_of_a_run_tells_nothing(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there anything that could: a bar tells by a thread, and at its end."""
    pace(monkeypatch, 0.0, 0.01)
    monkeypatch.setenv("RANK", "1")
    with progress_bar("train", 8) as bar:
        assert bar is progress.SILENT
        bar.update(advance=2)
    assert told.lines == []


IMPORTS = """
import importlib.abc, sys, threading
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            for thread in threading.enumerate():
                if isinstance(thread, threading.Timer):
                    thread.join()  # it has told what takes long
            raise SystemExit(7)
sys.meta_path.insert(0, Slow())
from draftkit import cli, progress
progress.QUIET = 0.01
cli.main()
"""


@pytest.mark.parametrize(
    "command",
    [
        "generate -o answers.jsonl",
        "capture -c answers.jsonl -o features",
        "train -c answers.jsonl -o drafter",
        "evaluate -d drafter -o results",
        "quickstart -o run",
        "export -d drafter -o out",
        "export -d drafter -o out --for vllm --target tiny",
        "plan",
        "calibrate -d drafter -o out",
        "profile -d drafter -o out.json",
        "simulate",
        "specialise --traces answers.jsonl -o mine",
        "serve",
        "doctor -d drafter",
        "features verify .",
        "verify-lossless",
        "push drafter you/it",
        "report .",
    ],
)
def test_loading_the_libraries_is_told(command: str, tmp_path: Path) -> None:
    """Every command that imports torch says so while it does."""
    (tmp_path / "answers.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "config.json").write_text("{}")
    run = [sys.executable, "-c", IMPORTS, *command.split()]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr  # it wanted torch
    assert "loading PyTorch and Transformers ..." in done.stderr
    if command.startswith("quickstart"):
        assert done.stderr.startswith("a drafter for the embedded target in about 6 minutes")


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def speak_at_once() -> None:
    """From now on progress of this process is told without a pause."""
    progress.QUIET = progress.LINE_EVERY = 0.05


def test_generate_moves_by_tokens_before_an_answer_is_finished(tmp_path: Path) -> None:
    """Redirected, with answers longer than the time between two lines."""
    out, told = tmp_path / "answers.jsonl", tmp_path / "log"
    told.touch()
    moved = r"generate 0/\d+, ([\d,]+) tokens.* at most \S+ left"
    command = ["generate", "-o", str(out), "--set", "generate.max_new_tokens=400"]
    process = start(command, told, before=speak_at_once)
    try:
        wait_until(lambda: re.search(moved, told.read_text()) or not process.is_alive())
    finally:
        process.kill()
        process.join()
    found = re.search(moved, told.read_text())
    assert found is not None and int(found.group(1).replace(",", "")) > 0

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


def test_what_is_left_never_grows_while_nothing_moves(capsys: Any) -> None:
    with progress_bar("train", 100, percent=True) as bar:
        time.sleep(0.5)
        bar.update(completed=50, note="step 11, 0.1 steps/s")
        time.sleep(1.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "train 50 %, step 11, 0.1 steps/s, 0:02"  # the half second that was left is over
    left = [line for line in lines if line.endswith("left")]
    assert left and left == sorted(left, key=lambda line: line.split(", ")[-1], reverse=True)


def test_a_part_has_its_own_name_count_and_clock(capsys: Any) -> None:
    with progress_bar("train", 100, percent=True) as bar:
        bar.update(completed=90)
        time.sleep(0.25)
        with bar.part("validate", 40) as part:
            time.sleep(0.15)
            part.update(completed=12)
            time.sleep(0.25)
        bar.update(completed=95)
        time.sleep(0.15)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train 90 %, ") and lines[-1].startswith("train 95 %, ")
    within = [line for line in lines if line.startswith("validate ")]
    assert within[0].startswith("validate 0/40, 0:00") and within[-1].startswith("validate 12/40, 0:00")


def test_a_rate_is_not_that_of_what_was_done_before(capsys: Any) -> None:
    with progress_bar("generate", 100, done=90) as bar:
        time.sleep(0.5)
        bar.update(advance=1)
        time.sleep(0.15)
    assert capsys.readouterr().err.splitlines()[-1] in (  # nine times half a second
        "generate 91/100, 0:01, 0:04 left",
        "generate 91/100, 0:01, 0:05 left",
    )


def test_a_terminal_shows_the_same(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("train", 100, percent=True) as bar:
        bar.update(completed=90, note="step 11")
        with bar.part("validate", 40) as part:
            part.update(advance=12)
    assert re.search(r"train .* 90 % step 11", capsys.readouterr().err)


def test_a_second_process_of_a_run_tells_nothing(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress_bar("train", 8) as bar:
        time.sleep(0.25)
        bar.update(advance=2)
    assert capsys.readouterr().err == ""


IMPORTS = """
import importlib.abc, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            time.sleep(0.5)
            raise SystemExit(7)
sys.meta_path.insert(0, Slow())
from draftkit import cli, progress
progress.QUIET = 0.1
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

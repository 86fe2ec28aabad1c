"""The newcomer's command, on the embedded target: everything it promises is there, and a second run does nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from draftkit.evaluate.run import EvalResult


def quickstart(out: Path) -> str:
    command = [sys.executable, "-m", "draftkit.cli", "quickstart", "--out", str(out), "--minutes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_ends_with_a_table_a_picture_and_what_to_type_next(tmp_path: Path) -> None:
    told = quickstart(tmp_path)
    for word in ("accepted length", "x plain decoding", "peak memory", "draftkit serve"):
        assert word in told
    results = [EvalResult.load(tmp_path / "results" / f"evaluate-T{t}.json") for t in (0, 1)]
    for result in results:
        assert result.accepted_len.keys() == {"code", "chat", "math", "macro"}
        assert 1 <= result.accepted_len["macro"].value <= 8
        assert all(s.ratio > 0 for s in result.speed.values()) and "macro" in result.speed
    assert (tmp_path / "results" / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    answers = (tmp_path / "answers.jsonl").read_bytes()

    again = quickstart(tmp_path)
    seconds = {s["name"]: s["seconds"] for s in json.loads((tmp_path / "times.json").read_text())["stages"]}
    assert max(seconds[name] for name in ("generate", "train", "evaluate")) < 5, "a finished stage was done again"
    assert (tmp_path / "answers.jsonl").read_bytes() == answers
    assert again.count("x plain decoding") == told.count("x plain decoding") == 2

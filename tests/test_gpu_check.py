"""checks/gpu.py, which few can run as it is meant: its parts with small models on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checks import gpu

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_part_runs_small_and_finds_nothing_wrong(tmp_path: Path) -> None:
    out = tmp_path / "small.json"
    run = subprocess.run(
        [sys.executable, "-m", "checks.gpu", "--small", "--minutes", "600", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads(out.read_text())
    assert {"families", "answers", "deepseek_v4", "attention", "sampling", "arms", "training"} < found.keys()
    assert not found["left_out"] and found["made"]["commit"]
    assert all(speed["planned"]["tokens_per_second"] > 0 for speed in found["arms"].values())


def test_what_the_time_does_not_allow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cut.json"
    command = ["gpu", "--small", "--minutes", "0", "--parts", "attention", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    assert json.loads(out.read_text())["left_out"] == ["attention"]

"""The newcomer's command, on the embedded target: everything it promises is there, and a second run does nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from draftkit import quickstart as whole_path
from draftkit.config import load_recipe
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


def test_a_run_that_was_stopped_while_it_measured_its_rate_counts_new_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that makes 100 answers a second; 150 are there already."""
    answers, now = tmp_path / "answers.jsonl", 0.0
    answers.write_text("{}\n" * 150, encoding="utf-8")

    def generate(target: Any, tokenizer: Any, recipe: Any, prompts: Sequence[Any], out: Path, answer: Any) -> int:
        nonlocal now
        there = len(out.read_text("utf-8").splitlines())
        now += (len(prompts) - there) / 100
        out.write_text("{}\n" * len(prompts), encoding="utf-8")
        return len(prompts)

    monkeypatch.setattr(whole_path.stages, "run_generate", generate)
    monkeypatch.setattr(whole_path, "answerer", lambda target, size: None)
    monkeypatch.setattr(whole_path.time, "perf_counter", lambda: now)
    target: Any = None
    count = whole_path._generate(target, None, load_recipe("tiny-quickstart"), answers, minutes=0.1)
    assert json.loads((tmp_path / "plan.json").read_text("utf-8"))["prompts"] == 150 + whole_path.PROBE_PROMPTS
    assert count == 150 + whole_path.PROBE_PROMPTS  # 84 would fit into the share: no answer is thrown away
    (tmp_path / "plan.json").unlink()
    answers.write_text("{}\n" * 150, encoding="utf-8")
    count = whole_path._generate(target, None, load_recipe("tiny-quickstart"), answers, minutes=1)
    assert count == round(60 * whole_path.GENERATE_SHARE * 100)

"""The newcomer's command, on the embedded target: everything it promises is there, and a second run does
nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftkit import quickstart as whole_path
from draftkit.config import Recipe, dump_recipe, load_recipe
from draftkit.errors import CheckpointError, ConfigError, DataError
from draftkit.evaluate.run import EvalResult
from draftkit.evaluate.speed import Speed
from draftkit.train.trainer import TrainReport


def quickstart(out: Path) -> str:
    command = [sys.executable, "-m", "draftkit.cli", "quickstart", "--out", str(out), "--minutes", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())  # whatever the width of the terminal


@pytest.mark.slow
def test_the_quickstart_ends_with_a_table_a_picture_and_what_to_type_next(tmp_path: Path) -> None:
    told = quickstart(tmp_path)
    for word in (
        "accepted length",
        "of the engine without a drafter",
        "peak memory",
        "serve --drafter",
        "make demo",
    ):
        assert word in told
    results = [EvalResult.load(tmp_path / "results" / f"evaluate-T{t}.json") for t in (0, 1)]
    for result in results:
        assert result.accepted_len.keys() == {"code", "chat", "math", "macro"}
        assert 1 <= result.accepted_len["macro"].value <= 8
        assert all(s.ratio > 0 for s in result.speed.values()) and result.speed["all"].prompts == 30
    assert (tmp_path / "results" / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert 'id="trained"' in page and 'id="reliability"' in page and 'id="missing"' in page  # no load test
    made = ("answers.jsonl", "drafter/best/model.safetensors", "results/evaluate-T1.json")
    written = [(tmp_path / name).stat().st_mtime_ns for name in made]

    again = quickstart(tmp_path)
    again_written = [(tmp_path / name).stat().st_mtime_ns for name in made]
    assert again_written == written, "a finished stage was done again"
    spoken = [text.count("of the engine without a drafter,") for text in (told, again)]
    assert spoken[0] == spoken[1] >= 2, "a finished evaluation is shown again"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Stages that take no time; the recipes that were trained. A training refuses another learning rate than
    the first."""
    recipes: list[Recipe] = []

    def train(
        target: Any, tokenizer: Any, recipe: Recipe, features: Path, out: Path, load: Any
    ) -> TrainReport:
        out.mkdir(exist_ok=True)
        if recipes and recipe.train.lr != recipes[0].train.lr:
            (out / "recipe.yaml").write_text(dump_recipe(recipe))
            raise CheckpointError("belongs to another recipe")
        recipes.append(recipe)
        return TrainReport(1, 1.0, 0, 1.0, {}, False)

    info = SimpleNamespace(name="tiny", num_layers=1, hidden_size=1, vocab_size=1)
    target = SimpleNamespace(info=info, model=torch.nn.Linear(1000, 7000, bias=False))
    speed = {"all": Speed(30, 1.0, 0.9, 1.1, 100, 100, 0.1)}
    monkeypatch.setattr(whole_path.stages, "open_target", lambda recipe: (target, None))
    captured = SimpleNamespace(tokens=1, samples=16)
    monkeypatch.setattr(whole_path.feature_stages, "run_capture", lambda *_: captured)
    monkeypatch.setattr(whole_path.feature_stages, "open_features", lambda *_: None)
    monkeypatch.setattr(whole_path.stages, "read_prompts", lambda _: [])
    monkeypatch.setattr(whole_path.train_stages, "run_train", train)
    monkeypatch.setattr(whole_path, "_generate", lambda *_: 1)
    monkeypatch.setattr(
        whole_path.evaluate_stages, "run_evaluate", lambda *_: [SimpleNamespace(records=(), speed=speed)]
    )
    monkeypatch.setattr(whole_path, "_simulated", lambda *_: 2.34)
    monkeypatch.setattr(whole_path, "plot_acceptance", lambda *_: None)
    monkeypatch.setattr(whole_path, "print_report", lambda *_: None)
    monkeypatch.setattr(whole_path, "write_report", lambda *_: None)
    return recipes


def test_a_drafter_is_only_said_to_be_there_when_its_training_came_to_its_end(
    tmp_path: Path, trained: list[Recipe]
) -> None:
    first, other = (load_recipe("tiny-quickstart", [f"train.lr={lr}"]) for lr in ("1e-3", "2e-3"))
    whole_path.run_quickstart(first, tmp_path, 1)
    whole_path.run_quickstart(first, tmp_path, 1)
    assert len(trained) == 1
    for _ in range(2):  # also the second time, with what the first refusal may have left
        with pytest.raises(CheckpointError, match="another recipe"):
            whole_path.run_quickstart(other, tmp_path, 1)


def test_the_end_says_in_plain_words_what_was_found(
    tmp_path: Path, trained: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    whole_path.run_quickstart(load_recipe("tiny-quickstart"), tmp_path, 1)
    told = " ".join(capsys.readouterr().out.split())
    assert "undertrained: it saw 50 % of the conversations" in told  # one step of 8 conversations, of 16
    assert (
        "gains little or nothing on this target: its 7 million weights lie in the processor's cache" in told
    )
    assert "2.3 x as fast for one user (simulated: draftkit simulate --traces" in told and "make demo" in told
    assert whole_path._undertrained(1.0) == ""


def test_a_folder_planned_for_other_minutes_is_refused(tmp_path: Path, trained: list[Recipe]) -> None:
    recipe = load_recipe("tiny-quickstart")
    whole_path.run_quickstart(recipe, tmp_path, 6)
    with pytest.raises(ConfigError, match=f"^--minutes 12: {tmp_path} was planned for 6; .*another --out$"):
        whole_path.run_quickstart(recipe, tmp_path, 12)
    assert len(trained) == 1
    for damaged in ("{", "3", '{"minutes": "6"}'):
        (tmp_path / "plan.json").write_text(damaged)
        with pytest.raises(DataError, match=r"plan\.json: .*another --out"):
            whole_path.run_quickstart(recipe, tmp_path, 6)


def test_a_run_that_was_stopped_while_it_measured_its_rate_counts_new_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that makes 100 answers a second; 150 are there already."""
    answers, now = tmp_path / "answers.jsonl", 0.0
    answers.write_text("{}\n" * 150, encoding="utf-8")

    def generate(
        target: Any, tokenizer: Any, recipe: Any, prompts: Any, out: Path, answer: Any, total: int
    ) -> Any:
        nonlocal now
        there, wanted = len(out.read_text("utf-8").splitlines()), len(prompts(0))
        now += (wanted - there) / 100
        out.write_text("{}\n" * wanted, encoding="utf-8")
        return SimpleNamespace(records=wanted)

    monkeypatch.setattr(whole_path.stages, "run_generate", generate)
    monkeypatch.setattr(whole_path, "answerer", lambda target, size: None)
    monkeypatch.setattr(whole_path.time, "perf_counter", lambda: now)
    target: Any = None
    count = whole_path._generate(target, None, load_recipe("tiny-quickstart"), answers, minutes=0.1)
    assert (
        json.loads((tmp_path / "plan.json").read_text("utf-8"))["prompts"] == 150 + whole_path.PROBE_PROMPTS
    )
    assert count == 150 + whole_path.PROBE_PROMPTS  # 84 would fit into the share: no answer is thrown away
    (tmp_path / "plan.json").unlink()
    answers.write_text("{}\n" * 150, encoding="utf-8")
    count = whole_path._generate(target, None, load_recipe("tiny-quickstart"), answers, minutes=1)
    assert count == round(60 * whole_path.GENERATE_SHARE * 100)

"""A disk that is full, or that may not be written, in every stage, as commands: one line that names the
file and says what to do, nothing half-written in its place, and the same command goes on when there is
room."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checks.forked import Disk, finished
from draftkit.output import write_text
from draftkit.target.place import EMBEDDED

pytestmark = pytest.mark.slow
QUICK = ["-r", "tiny-quickstart", "--set", "generate.max_new_tokens=16", "--set", "generate.batch_size=8"]
FEW = ["--set", "train.steps=8", "--set", "train.validate_every=4", "--set", "evaluate.prompts_per_domain=1"]
FEW += ["--set", "evaluate.max_new_tokens=8", "--set", "evaluate.speed_prompts=1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stages read: prompts, answers, features, a drafter, traces, logs."""
    work = tmp_path_factory.mktemp("disk")
    lines = (EMBEDDED / "prompts.jsonl").read_text("utf-8").splitlines()[:40]
    (work / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x" * 99}]}
            for i in range(60)]  # fmt: skip
    (work / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "mixture.yaml").write_text(f"sources: [{{path: {work / 'log.jsonl'}}}]\n")
    for name in ("generate", "capture", "train"):
        code, told = finished(commands(work, work)[name], work / "told")
        assert code == 0, told
    return work


def commands(work: Path, out: Path) -> dict[str, list[str]]:
    """Every command that writes results, with where it writes."""
    best = str(work / "drafter" / "best")
    asked = ["-p", str(work / "prompts.jsonl")]
    settings = [*QUICK, *FEW]
    return {
        "generate": ["generate", *settings, *asked, "-o", str(out / "answers.jsonl")],
        "capture": ["capture", *settings, "-c", str(work / "answers.jsonl"), "-o", str(out / "features")],
        "train": ["train", *settings, "-f", str(work / "features"), "-o", str(out / "drafter")],
        "evaluate": ["evaluate", *settings, "-d", best, *asked, "-o", str(out / "results")],
        "calibrate": ["calibrate", *settings, "-d", best, *asked, "-o", str(out / "calibration")],
        "profile": [
            *("profile", "--tokens", "1", "--tokens", "2", "--repeats", "1", "-d", best),
            *("-o", str(out / "step_rate.json")),
        ],
        "simulate": [
            *("simulate", "--step-rate", "balanced", "--requests", "20", "--concurrency", "1"),
            *("-o", str(out / "simulation")),
        ],
        "export": ["export", "-d", best, "-o", str(out / "exported")],
        "traces": ["traces", str(work / "log.jsonl"), "-o", str(out / "traced")],
        "mix": ["mix", str(work / "mixture.yaml"), "-o", str(out / "mixed.jsonl")],
    }


NAMES = sorted(commands(Path(), Path()))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_names_the_file_and_the_command_goes_on_later(
    name: str, work: Path, tmp_path: Path
) -> None:
    command = commands(work, tmp_path)[name]
    log = work / f"{name}.log"  # which grows beside it
    code, told = finished(command, log, Disk(most_bytes=1500))
    last = told.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in told, told
    assert last.startswith(f"error: {tmp_path}") and "cannot be written" in last and "make room" in last
    code, told = finished(command, log)
    assert code == 0, told
    left = [p for pattern in ("*.partial", "*.new", "*.part", "*.parts") for p in tmp_path.rglob(pattern)]
    assert not left


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_may_not_be_written_is_named_before_the_work(
    name: str, work: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    code, told = finished(commands(work, closed)[name], tmp_path / "log", Disk(keeps_out=True))
    last = told.strip().splitlines()[-1]
    assert code in (1, 2) and "Traceback" not in told, told
    assert last.startswith("error: ") and str(closed) in last and "Permission denied" in last
    assert not list(closed.iterdir())


def test_a_device_that_is_full_is_told_as_such() -> None:
    """/dev/full takes nothing: what goes there is told, too."""
    command = [sys.executable, "-m", "draftkit.cli", "traces", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0 and "No space left" in done.stderr


def test_writers_of_one_file_do_not_take_each_others_unfinished_one(tmp_path: Path) -> None:
    """Processes of one command write the same manifest at once."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_text(tmp_path / "note", f"{n}" * 100), range(400)))
    text = (tmp_path / "note").read_text()
    assert text == text[: len(text) // 100] * 100
    assert [path.name for path in tmp_path.iterdir()] == ["note"]

"""Training in real processes: two of them under torchrun, killed ones, and another number than before."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from checks.forked import Ranks
from draftkit.data.conversations import Conversation, Message
from draftkit.draft.checkpoint import load_drafter
from draftkit.settings import CaptureSettings
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.target.transformers import TransformersTarget
from support import stopping
from support.patience import PATIENCE
from support.stores import capture_by

pytestmark = pytest.mark.slow

WORDS = "list value holds step return what add number the a of is".split()
STEPS, EVERY = 12, 4  # and steps between validations


@pytest.fixture(scope="module")
def features(
    target: TransformersTarget, target_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    rng = random.Random(4)
    text = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randrange(low, high)))  # noqa: E731
    read = [
        Conversation(
            f"c{i}", ["code", "chat"][i % 2], (Message("user", text(1, 6)), Message("assistant", text(3, 20)))
        )
        for i in range(40)
    ]
    folder = tmp_path_factory.mktemp("features")
    shown = TemplateFormat(load_tokenizer(str(target_folder)))
    capture_by(target, shown, read, folder, (1, 2), CaptureSettings(dtype="float32"))
    return folder


class Runs:
    """Starts `draftkit train` on the features, with some settings, in one process or in several."""

    def __init__(self, target_folder: Path, features: Path) -> None:
        values = {
            "target.path": target_folder,
            "drafter.num_features": 2,
            "drafter.num_layers": 2,
            "drafter.markov_rank": 6,
        }
        values |= {"drafter.block_size": 4, "train.batch_size": 8, "train.anchors": 6, "train.steps": STEPS}
        values |= {"train.validate_every": EVERY, "train.validation_share": 0.2, "train.decode_prompts": 2}
        self.values, self.features = values, features

    def words(self, out: Path, **changed: Any) -> list[str]:
        """The command, without the program."""
        values = self.values | {f"train.{k}" if "." not in k else k: v for k, v in changed.items()}
        sets = [
            part
            for key, value in values.items()
            for part in ("--set", f"{key}={json.dumps(value, default=str)}")
        ]
        return ["train", "-f", str(self.features), "-o", str(out), *sets]

    def finish(self, out: Path, processes: int = 1, **changed: Any) -> list[str]:
        """What each of them printed."""
        ended = Ranks(self.words(out, **changed), processes, out.with_name("log")).finish()
        assert [code for code, _ in ended] == [0] * processes, ended
        return [told for _, told in ended]

    def end(self, out: Path, number: signal.Signals, **changed: Any) -> int:
        """Send one process the signal when the state was saved for the first time; the exit code."""
        stops = partial(stopping.signal_at, stopping.STATES, 1)
        ranks = Ranks(self.words(out, **changed), 1, out.with_name("log"), stops)
        [pid] = ranks.pids
        stopping.wait_for_stop(pid)
        os.kill(pid, number)
        if number != signal.SIGKILL:
            stopping.let_go([pid], number)
        return ranks.finish()[0][0]


@pytest.fixture(scope="module")
def runs(target_folder: Path, features: Path) -> Runs:
    return Runs(target_folder, features)


@pytest.fixture(scope="module")
def alone(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, not disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(folder)
    return folder


def read_log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curve(folder: Path) -> list[float]:
    return [r["loss"] for r in read_log(folder) if "loss" in r]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_drafter(folder / "last").state_dict()


@pytest.mark.parametrize(
    ("algorithm", "shard", "processes"),
    [("dspark", False, 4), ("dspark", True, 2), ("eagle3", True, 2)],
)
def test_several_processes_give_the_loss_curve_and_validation_of_one(
    algorithm: str, shard: bool, processes: int, runs: Runs, alone: Path, tmp_path: Path
) -> None:
    changed = {"drafter.algorithm": algorithm, "drafter.num_layers": 1 if algorithm == "eagle3" else 2}
    if algorithm == "eagle3":
        alone = tmp_path / "alone"
        runs.finish(alone, **changed)
    printed = runs.finish(
        tmp_path / "several", processes=processes, shard=shard, micro_batch_size=2, **changed
    )
    assert curve(tmp_path / "several") == pytest.approx(curve(alone), abs=1e-4)
    assert len(curve(alone)) == STEPS
    first, second = weights(alone), weights(tmp_path / "several")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=2e-3, rtol=1e-2)
    one, two = (
        next(r["validation"] for r in read_log(f) if "validation" in r) for f in (alone, tmp_path / "several")
    )
    simulated = [name for name in one if name != "decoded"]
    assert [two[k] for k in simulated] == pytest.approx([one[k] for k in simulated], abs=1e-3)
    assert "decoded" not in two, "answers for the log need the model, which no process of several loads"
    spoken = [told.count("simulated accepted length") for told in printed]
    assert spoken == [1] + [0] * (processes - 1), "only the first process speaks"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_killed_run_goes_on_to_the_same_bits(
    number: signal.Signals, code: int, runs: Runs, alone: Path, tmp_path: Path
) -> None:
    assert runs.end(tmp_path / "run", number) == code
    assert EVERY <= len(curve(tmp_path / "run")) < STEPS, "it was ended in the middle"
    runs.finish(tmp_path / "run")
    assert curve(tmp_path / "run") == curve(alone)
    first, second = weights(alone), weights(tmp_path / "run")
    assert all(torch.equal(first[k], second[k]) for k in first)


def is_in_the_middle(folder: Path) -> bool:
    """Whether the state is that of the last step in the log, and not the end."""
    step = json.loads((folder / "state" / "position.json").read_text())["step"]
    return bool(EVERY <= step < STEPS and len(curve(folder)) == step)


def test_a_run_goes_on_with_more_processes(runs: Runs, alone: Path, tmp_path: Path) -> None:
    """What was saved fits any number."""
    assert runs.end(tmp_path / "run", signal.SIGTERM, shard=True) == 143
    assert is_in_the_middle(tmp_path / "run")
    runs.finish(tmp_path / "run", 2, shard=True)
    assert curve(tmp_path / "run") == pytest.approx(curve(alone), abs=1e-4)


def test_torchrun_passes_a_signal_on_and_one_process_goes_on(runs: Runs, alone: Path, tmp_path: Path) -> None:
    """Its processes end after the same step, and what they saved fits any number."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = [stopping.SCRIPT, stopping.STATES, "1", *runs.words(tmp_path / "run", shard=True)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*torchrun, *train], stdout=log, stderr=log)
    workers: list[psutil.Process] = []
    try:
        launcher = psutil.Process(process.pid)
        while len(workers) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            workers = launcher.children()
        stopping.wait_for_stop(*(worker.pid for worker in workers))
        process.send_signal(signal.SIGTERM)
        stopping.let_go([worker.pid for worker in workers], signal.SIGTERM)
        assert process.wait(PATIENCE) != 0
    finally:
        for left in (process, *workers):
            with suppress(psutil.NoSuchProcess):
                left.kill()
    assert is_in_the_middle(tmp_path / "run")
    runs.finish(tmp_path / "run", shard=True)
    assert curve(tmp_path / "run") == pytest.approx(curve(alone), abs=1e-4)

"""Capture in real processes: several under torchrun write the same store as one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from draftkit.features.store import FeatureStore

pytestmark = pytest.mark.slow

WORDS = "list value holds step return what add number the a of is".split()
COUNT = 1500


class Captures:
    """Starts `draftkit capture` of the same conversations, in one process or in several."""

    def __init__(self, target_folder: Path, folder: Path) -> None:
        self.conversations = folder / "talk.jsonl"
        rng = random.Random(0)
        with self.conversations.open("w") as file:
            for i in range(COUNT):
                said = [("user", 4), ("assistant", 30)]
                talk = [{"role": r, "content": " ".join(rng.choices(WORDS, k=k))} for r, k in said]
                file.write(json.dumps({"id": f"c{i}", "domain": "chat", "messages": talk}) + "\n")
        self._sets = [f"target.path={target_folder}", "drafter.num_features=2", "capture.batch_tokens=512"]

    def start(self, out: Path, processes: int = 1) -> subprocess.Popen[str]:
        start = [sys.executable, "-m"]
        if processes > 1:
            start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        sets = [word for value in self._sets for word in ("--set", value)]
        command = [*start, "draftkit.cli", "capture", "-c", str(self.conversations), "-o", str(out), *sets]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, out: Path, processes: int = 1) -> str:
        process = self.start(out, processes)
        told, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        return told


@pytest.fixture(scope="module")
def captures(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Captures:
    return Captures(target_folder, tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def alone(captures: Captures, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("alone")
    captures.finish(folder)
    return FeatureStore(folder)


@pytest.mark.parametrize("processes", [2, 4])
def test_torchrun_writes_the_same_records(
    processes: int, captures: Captures, alone: FeatureStore, tmp_path: Path
) -> None:
    told = captures.finish(tmp_path, processes)
    store = FeatureStore(tmp_path)
    assert store.digest() == alone.digest() and len(store) == COUNT
    writers = {store.record(i).place[0] for i in range(len(store))}
    assert len(writers) == processes, "each did a share"
    assert told.count(f"{COUNT} samples") == 1, "one of them speaks, of the whole"

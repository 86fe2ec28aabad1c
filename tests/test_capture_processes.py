"""Capture in real processes: several under torchrun, killed ones, and stores that are the same whoever wrote
them."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from draftkit.features.store import FeatureStore
from draftkit.features.verify import verify

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

    def start(self, out: Path, processes: int = 1, *more: str) -> subprocess.Popen[str]:
        start = [sys.executable, "-m"]
        if processes > 1:
            start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        sets = [word for value in (*self._sets, *more) for word in ("--set", value)]
        command = [*start, "draftkit.cli", "capture", "-c", str(self.conversations), "-o", str(out), *sets]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, out: Path, processes: int = 1, *more: str) -> str:
        process = self.start(out, processes, *more)
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


def test_a_killed_process_loses_nothing_and_its_share_is_taken_over(
    captures: Captures, alone: FeatureStore, tmp_path: Path
) -> None:
    """Two processes that know nothing of each other; one is killed while it holds a part."""
    first, second = (captures.start(tmp_path) for _ in range(2))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("index-*.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    while not all(p.stat().st_size for p in tmp_path.glob("index-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors[-3000:]
    assert FeatureStore(tmp_path).digest() == alone.digest()


def test_twenty_kills_lose_no_record_and_change_no_bit(
    captures: Captures, alone: FeatureStore, tmp_path: Path
) -> None:
    rng, kills, before = random.Random(1), 0, 0
    while kills < 20:
        process = captures.start(tmp_path)
        index = tmp_path / "index-000.jsonl"
        grown = before + rng.randrange(1, 20_000)
        while process.poll() is None and (not index.exists() or index.stat().st_size < grown):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
        assert not verify(tmp_path).damaged
        assert index.stat().st_size >= before, "what was written stays"
        before = index.stat().st_size
    assert kills >= 5
    captures.finish(tmp_path)
    assert FeatureStore(tmp_path).digest() == alone.digest()


def test_two_processes_that_share_the_target_capture_what_one_does(
    captures: Captures, alone: FeatureStore, tmp_path: Path
) -> None:
    """Tensor parallelism (tp_plan, over gloo here): sums of parts round in another order."""
    told = captures.finish(tmp_path, 2, "target.spread=tensors")
    store = FeatureStore(tmp_path)
    assert len(store) == COUNT and told.count(f"{COUNT} samples") == 1
    assert {store.record(i).place[0] for i in range(COUNT)} == {0}, "one writes"
    for i in range(0, COUNT, 50):
        one, other = store[i], alone[i]
        assert one.id == other.id and torch.equal(one.tokens_T, other.tokens_T)
        torch.testing.assert_close(one.features_TF, other.features_TF, atol=0.02, rtol=0.02)
        torch.testing.assert_close(one.last_hidden_TH, other.last_hidden_TH, atol=0.02, rtol=0.02)


def test_a_target_that_is_spread_wants_the_processes_it_is_for(captures: Captures, tmp_path: Path) -> None:
    for spread, processes, told in (
        ("tensors", 1, "start them with torchrun"),
        ("layers", 2, "for one process"),
    ):
        process = captures.start(tmp_path, processes, f"target.spread={spread}")
        _, errors = process.communicate(timeout=120)
        assert (
            process.returncode and told in errors and "Traceback" not in errors.split("ChildFailedError")[0]
        )

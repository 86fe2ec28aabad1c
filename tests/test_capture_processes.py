"""Capture in real processes: several that share the work, killed ones, and stores that are the same
whoever wrote them."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from checks import forked
from checks.forked import Disk, Ranks
from draftkit import stages
from draftkit.config import load_recipe
from draftkit.errors import ConfigError
from draftkit.features.index import Index, shard_name
from draftkit.features.store import FeatureStore
from draftkit.features.verify import verify
from support import together
from support.patience import wait_until
from support.stopping import RECORDS, signal_at, wait_for_stop

pytestmark = pytest.mark.slow

WORDS = "list value holds step return what add number the a of is".split()
COUNT = 1030  # five parts: more than there are processes
NOTES = "draftkit.features.writer:StoreWriter.note"


class Captures:
    """Starts `draftkit capture` of the same conversations, in one process or in several."""

    def __init__(self, target_folder: Path, folder: Path) -> None:
        self.conversations = folder / "talk.jsonl"
        rng = random.Random(0)
        with self.conversations.open("w") as file:
            for i in range(COUNT):
                said = [("user", 4), ("assistant", 12)]
                talk = [{"role": r, "content": " ".join(rng.choices(WORDS, k=k))} for r, k in said]
                file.write(json.dumps({"id": f"c{i}", "domain": "chat", "messages": talk}) + "\n")
        self._sets = [f"target.path={target_folder}", "drafter.num_features=2", "capture.batch_tokens=512"]

    def words(self, out: Path, *more: str) -> list[str]:
        """The command, without the program."""
        sets = [word for value in (*self._sets, *more) for word in ("--set", value)]
        return ["capture", "-c", str(self.conversations), "-o", str(out), *sets]

    def finish(
        self, out: Path, processes: int = 1, *more: str, before: Callable[[], None] | None = None
    ) -> list[str]:
        """What each of them printed."""
        ended = Ranks(self.words(out, *more), processes, out.with_name("log"), before).finish()
        assert [code for code, _ in ended] == [0] * processes, ended
        return [told for _, told in ended]


@pytest.fixture(scope="module")
def captures(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Captures:
    return Captures(target_folder, tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def alone(captures: Captures, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("alone") / "out"
    captures.finish(folder)
    return FeatureStore(folder)


def is_the_work_of(processes: int, folder: Path, alone: FeatureStore) -> bool:
    """Whether it is the store of one process, and each of several did a share."""
    store = FeatureStore(folder)
    writers = {store.record(i).place[0] for i in range(len(store))}
    return store.digest() == alone.digest() and len(store) == COUNT and len(writers) == processes


def test_torchrun_writes_the_same_records(captures: Captures, alone: FeatureStore, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, together.SCRIPT, *captures.words(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_the_work_of(2, tmp_path / "out", alone)
    assert done.stdout.count(f"{COUNT} samples") == 1, "one of them speaks, of the whole"


def test_four_processes_write_the_same_records(
    captures: Captures, alone: FeatureStore, tmp_path: Path
) -> None:
    told = captures.finish(tmp_path / "out", 4, before=together.wait_before_the_first_part)
    assert is_the_work_of(4, tmp_path / "out", alone)
    assert [one.count(f"{COUNT} samples") for one in told] == [1, 0, 0, 0], "one speaks, of the whole"


def test_a_killed_process_loses_nothing_and_its_share_is_taken_over(
    captures: Captures, alone: FeatureStore, tmp_path: Path
) -> None:
    """Two processes that know nothing of each other; one is killed while it holds a part."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    first = forked.start(captures.words(out), tmp_path / "first.txt", before=partial(signal_at, RECORDS, 3))
    assert first.pid is not None
    wait_for_stop(first.pid)
    assert in_the_middle(out)
    second = forked.start(captures.words(out), log)
    wait_until(lambda: Index(out).parts or not second.is_alive())
    assert second.is_alive(), "it waits for what the first one holds"
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL and in_the_middle(out)
    second.join()
    assert second.exitcode == 0, log.read_text()
    assert FeatureStore(out).digest() == alone.digest()


def in_the_middle(out: Path) -> bool:
    """Whether the first writer has begun a part that is not finished."""
    path = out / "index-000.jsonl"
    said = path.read_text() if path.exists() else ""
    return '"record"' in said and said.count('{"begun"') > said.count('{"part"')


def test_kills_lose_no_record_and_change_no_bit(
    captures: Captures, alone: FeatureStore, tmp_path: Path
) -> None:
    """In turn after some records, before their lines are in the index, and in the middle of a write."""
    rng, before = random.Random(1), 0
    out, log = tmp_path / "out", tmp_path / "log.txt"
    index, shard = out / "index-000.jsonl", out / shard_name(0, 0)
    for number in range(12):
        disk, ends = Disk(), partial(
            signal_at, NOTES, rng.randrange(2, 8), signal.SIGKILL, before=number % 3 == 0
        )  # fmt: skip
        if number % 3 == 2:
            most = (shard.stat().st_size if shard.exists() else 0) + rng.randrange(1, 200_000)
            disk, ends = Disk(most, deadly=True), None
        process = forked.start(captures.words(out), log, disk, ends)
        process.join()
        assert process.exitcode in (-signal.SIGKILL, -signal.SIGXFSZ), log.read_text()
        assert not verify(out).damaged
        assert index.stat().st_size >= before, "what was written stays"
        before = index.stat().st_size
    captures.finish(out)
    assert FeatureStore(out).digest() == alone.digest()


def test_two_processes_that_share_the_target_capture_what_one_does(
    captures: Captures, alone: FeatureStore, tmp_path: Path
) -> None:
    """Tensor parallelism (tp_plan, over gloo here): sums of parts round in another order."""
    told = captures.finish(tmp_path / "out", 2, "target.spread=tensors")
    store = FeatureStore(tmp_path / "out")
    assert len(store) == COUNT
    assert [one.count(f"{COUNT} samples") for one in told] == [1, 0]
    assert {store.record(i).place[0] for i in range(COUNT)} == {0}, "one writes"
    for i in range(0, COUNT, 50):
        one, other = store[i], alone[i]
        assert one.id == other.id and torch.equal(one.tokens_T, other.tokens_T)
        torch.testing.assert_close(one.features_TF, other.features_TF, atol=0.02, rtol=0.02)
        torch.testing.assert_close(one.last_hidden_TH, other.last_hidden_TH, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("spread", "processes", "split", "told"),
    [
        ("tensors", "1", True, "start them with torchrun"),
        ("tensors", "2", False, "is for capture alone"),
        ("layers", "2", True, "is for one process"),
    ],
)
def test_a_target_that_is_spread_wants_the_processes_it_is_for(
    spread: str, processes: str, split: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ConfigError, match=told):
        stages.open_target(load_recipe("tiny-dspark", [f"target.spread={spread}"]), split=split)

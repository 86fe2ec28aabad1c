"""Capture does several things at once: the target reads, a thread writes, worker processes render."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from draftkit.data.messages import Conversation, Message, WrittenTurn
from draftkit.errors import DataError, FeatureStoreError
from draftkit.features import capture as capture_module
from draftkit.features import rendering
from draftkit.features import texts as texts_module
from draftkit.features.capture import capture
from draftkit.features.record import Text
from draftkit.features.store import FeatureStore
from draftkit.features.writer import StoreWriter
from draftkit.settings import CaptureSettings
from draftkit.target.interface import TargetInfo
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from support.patience import PATIENCE, wait_until

HIDDEN, COUNT = 4, 48
INFO = TargetInfo("made", None, "made", 1 << 16, HIDDEN, 4, (), 4096, "none")
SETTINGS = CaptureSettings(dtype="float32", batch_tokens=1, max_length=256)  # one text at a time
MOST_READ = 3  # before the first is written: two wait, one of them in the thread, and the next comes


class MadeReader:
    """Vectors that tell the tokens; notes how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.second = Event()

    def read(self, texts: Sequence[Text], last_hidden: bool = True) -> list[tuple[Tensor, Tensor]]:
        """One layer."""
        self.asked += 1
        if self.asked == 2:
            self.second.set()
        vectors = [t.tokens_E[t.start :, None].float().repeat(1, HIDDEN) for t in texts]
        return [(v, -v) for v in vectors]


def talk(count: int = COUNT) -> list[Conversation]:
    return [
        Conversation(
            f"c{i}", "chat", (Message("user", f"Add {i}."), Message("assistant", f"It is {i} + 1 = {i + 1}."))
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def shown() -> TemplateFormat:
    return TemplateFormat(load_tokenizer("tiny"))


def captured(
    shown: TemplateFormat, out: Path, reader: MadeReader | None, conversations: list[Conversation]
) -> FeatureStore:
    capture(INFO, reader, shown, conversations, out, (1,), SETTINGS)
    return FeatureStore(out)


def test_records_are_counted_as_they_are_read_and_those_of_an_earlier_run_at_once(
    shown: TemplateFormat, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []

    def run() -> None:
        told.clear()
        capture(INFO, MadeReader(), shown, talk(), tmp_path, (1,), SETTINGS, lambda *one: told.append(one))

    run()
    assert len(told) == COUNT and {conversations for conversations, _ in told} == {1}
    store = FeatureStore(tmp_path)
    assert sum(tokens for _, tokens in told) == sum(len(store[i].tokens_T) for i in range(len(store)))
    run()
    assert told == [(COUNT, 0)]


def test_the_target_reads_on_while_a_batch_is_written(
    shown: TemplateFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, add = MadeReader(), StoreWriter.add

    def wait_for_the_second(writer: StoreWriter, records: list[tuple[Text, int, bytes]]) -> None:
        assert reader.second.wait(PATIENCE), "nothing is read before the first batch is written"
        add(writer, records)

    monkeypatch.setattr(StoreWriter, "add", wait_for_the_second)
    store = captured(shown, tmp_path, reader, talk())
    assert len(store) == reader.asked == COUNT
    for sample in store:  # type: ignore[attr-defined]
        assert torch.equal(sample.features_TF[: sample.context, 0], sample.tokens_T[: sample.context].float())


def test_few_batches_wait_for_a_slow_disk(
    shown: TemplateFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, goes_on, add = MadeReader(), Event(), StoreWriter.add

    def slow(writer: StoreWriter, records: list[tuple[Text, int, bytes]]) -> None:
        goes_on.wait(PATIENCE)
        add(writer, records)

    monkeypatch.setattr(StoreWriter, "add", slow)
    work = Thread(target=captured, args=(shown, tmp_path, reader, talk()))
    work.start()
    wait_until(lambda: reader.asked >= MOST_READ)
    time.sleep(0.3)  # in which no more is read
    held = reader.asked
    goes_on.set()
    work.join()
    assert held == MOST_READ and len(FeatureStore(tmp_path)) == COUNT


def test_an_error_of_the_thread_ends_the_capture_and_nothing_is_written_after_it(
    shown: TemplateFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = captured(shown, tmp_path / "whole", MadeReader(), talk())
    reader, add = MadeReader(), StoreWriter.add
    written: list[int] = []

    def full_at_the_fifth(writer: StoreWriter, records: list[tuple[Text, int, bytes]]) -> None:
        written.append(len(records))
        if len(written) == 5:
            raise FeatureStoreError("the disk is full")
        add(writer, records)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "add", full_at_the_fifth)
        with pytest.raises(FeatureStoreError, match="the disk is full"):
            captured(shown, tmp_path / "parts", reader, talk())
    assert len(written) == 5 and reader.asked <= 5 + MOST_READ
    assert captured(shown, tmp_path / "parts", MadeReader(), talk()).digest() == whole.digest()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, after the first of many small chunks."""
    monkeypatch.setattr(rendering, "ALONE", 1)
    monkeypatch.setattr(rendering, "workers_here", lambda: 2)
    monkeypatch.setattr(texts_module, "PART", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_workers_render_what_this_process_would(
    shown: TemplateFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers_seen: set[int | None] = set()
    reader, read = MadeReader(), MadeReader.read

    def noting(self: MadeReader, texts: Sequence[Text]) -> list[tuple[Tensor, Tensor]]:
        workers_seen.update(child.pid for child in multiprocessing.active_children())
        return read(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(MadeReader, "read", noting)
        store = captured(shown, tmp_path / "workers", reader, talk())
    assert len(workers_seen) == 2 and not multiprocessing.active_children()
    with monkeypatch.context() as patched:
        patched.setattr(rendering, "workers_here", lambda: 0)
        assert captured(shown, tmp_path / "alone", MadeReader(), talk()).digest() == store.digest()
    beyond = Conversation("bad one", "chat", talk(1)[0].messages, turns=(WrittenTurn((3, 4), (1 << 17, 5)),))
    refused = [*talk(40), beyond]
    monkeypatch.setattr(rendering, "workers_here", lambda: 1)  # it imports for seconds
    with pytest.raises(DataError, match="bad one"):
        captured(shown, tmp_path / "refused", None, refused)


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_a_killed_worker_is_one_line_and_the_same_command_goes_on(
    shown: TemplateFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MadeReader.read

    def killing(self: MadeReader, texts: Sequence[Text]) -> list[tuple[Tensor, Tensor]]:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        return read(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(MadeReader, "read", killing)
        with pytest.raises(FeatureStoreError, match=r"rendered conversations was ended .* run the same"):
            captured(shown, tmp_path, MadeReader(), talk())
    monkeypatch.setattr(rendering, "workers_here", lambda: 0)  # they import for seconds
    assert len(captured(shown, tmp_path, MadeReader(), talk())) == COUNT


def test_nothing_is_written_any_more_when_a_failed_capture_lets_go_of_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the part over at once, and would write the same records again."""
    told: list[str] = []
    add, lock_of = StoreWriter.add, capture_module.lock_of

    class Broken(MadeReader):
        def read(self, texts: Sequence[Text], last_hidden: bool = True) -> list[tuple[Tensor, Tensor]]:
            if self.asked == 2:
                raise RuntimeError("out of memory")
            return super().read(texts, last_hidden)

    def slowly(writer: StoreWriter, records: Sequence[tuple[Text, int, bytes]]) -> None:
        time.sleep(0.2)
        add(writer, records)
        told.append("written")

    def noting(path: Path) -> Any:
        lock = lock_of(path)
        if lock is not None and path.name.startswith("part-"):
            release = lock.release
            monkeypatch.setattr(lock, "release", lambda: (told.append("released"), release()))
        return lock

    monkeypatch.setattr(StoreWriter, "add", slowly)
    monkeypatch.setattr(capture_module, "lock_of", noting)
    with pytest.raises(RuntimeError, match="out of memory"):
        capture(INFO, Broken(), TemplateFormat(load_tokenizer("tiny")), talk(6), tmp_path, (1,), SETTINGS)
    assert told == ["written", "written", "released"]

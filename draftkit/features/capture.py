"""Capture: the target reads conversations, and what it thought goes into a feature store.

Conversations are read in chunks, and each is worked on by one process, which holds a lock on it that the
system takes away when the process dies. So any number of processes and machines that share a disk divide the
work, and what a dead one left is taken over. Which texts the target reads together depends on the chunk
alone: the records are the same, bit for bit, whoever wrote them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from draftkit.data.messages import Conversation
from draftkit.data.samples import SampleCounts
from draftkit.errors import FeatureStoreError
from draftkit.features.compute import Reader, batches
from draftkit.features.index import Index, Key
from draftkit.features.manifest import StoreManifest, begin_store
from draftkit.features.overlap import WriterThread
from draftkit.features.record import NO_FEATURES, RecordForm, Text
from draftkit.features.rendering import Rendering
from draftkit.features.texts import Chunk, PartTexts, added, chunks
from draftkit.features.writer import SHARD_BYTES, WORK, StoreWriter, check_room
from draftkit.output import lock_of
from draftkit.settings import CaptureSettings
from draftkit.target.interface import TargetInfo
from draftkit.target.prompt_format import PromptFormat
from draftkit.target.tokenizer import tokenizer_hash
from draftkit.target.transformers import check_feature_layers, last_tap

WAIT_SECONDS = 0.5  # between two looks at what other processes hold


@dataclass(frozen=True)
class CaptureReport:
    """What was captured: samples, their tokens, and what was left out and why."""

    samples: int
    tokens: int
    too_long: int
    counts: SampleCounts

    def left_out(self) -> str:
        """How many conversations and answers were left out, and why; how many answers were cut."""
        c = self.counts
        cut = f"{c.cut} cut answers" + (f", {c.cut_dropped} of them dropped" if c.cut_dropped else "")
        rewritten = f"{c.rewritten} rewritten by the chat template"
        return f"{self.too_long} too long, {c.without_answer} without an answer, {rewritten}, {cut}"


def capture(
    info: TargetInfo,
    reader: Reader | None,
    prompt_format: PromptFormat,
    conversations: Iterable[Conversation],
    out: Path,
    feature_layers: tuple[int, ...],
    settings: CaptureSettings,
    tick: Callable[[int, int], None] = lambda conversations, tokens: None,
    append: bool = False,
) -> CaptureReport:
    """Fill the store in `out` by what `reader` gives, or with texts alone where there is none; what is there
    already stays, so that an interrupted capture goes on. `conversations` may be walked several times. With
    `append` other conversations are added to a finished store. `tick` is told of conversations that are
    finished, now or before, and of tokens that this process has read.

    Raises FeatureStoreError when `out` holds a store of something else or the disk has too little room,
    DataError when the chat template refuses a conversation.
    """
    layers = tuple(sorted(feature_layers))
    check_feature_layers(layers, last_tap(info))
    dtype = settings.dtype if reader else NO_FEATURES
    manifest = begin_store(out, manifest_for(info, prompt_format, layers, settings, dtype))
    largest = manifest.form.bytes_of(settings.max_length, settings.max_length, settings.max_length)
    if largest > SHARD_BYTES:
        told = f"capture.max_length: a window of {settings.max_length} tokens takes {largest / 2**30:.2f} GiB"
        raise FeatureStoreError(f"{told}, a shard holds {SHARD_BYTES / 2**30:.0f}; give less, or dtype fp8")
    with (
        StoreWriter(out) as writer,
        WriterThread() as thread,
        Rendering(prompt_format, info, settings) as rendering,
    ):
        work = _Work(writer, thread, rendering, manifest, reader, settings, append, tick)
        while not work.walk(conversations):
            time.sleep(WAIT_SECONDS)
        return work.report()


def manifest_for(
    info: TargetInfo,
    prompt_format: PromptFormat,
    layers: tuple[int, ...],
    settings: CaptureSettings,
    dtype: str,
) -> StoreManifest:
    """The manifest of a store that capture with these settings makes."""
    return StoreManifest(
        target=info.name,
        fingerprint=info.fingerprint,
        feature_layers=layers,
        template_hash=prompt_format.digest,
        tokenizer_hash=tokenizer_hash(prompt_format.tokenizer),
        dtype=dtype,
        hidden_size=info.hidden_size,
        max_length=settings.max_length,
        cut_answers=settings.cut_answers,
        switches=dict(prompt_format.switches),
        today=prompt_format.today.isoformat() if prompt_format.today else None,
    )


@dataclass(frozen=True)
class _Held:
    """A chunk that this process has locked, and what gives its texts."""

    chunk: Chunk
    lock: FileLock
    texts: Callable[[], PartTexts]


@dataclass
class _Work:
    """One process's work on a store."""

    writer: StoreWriter
    thread: WriterThread
    rendering: Rendering
    manifest: StoreManifest
    reader: Reader | None
    settings: CaptureSettings
    append: bool
    tick: Callable[[int, int], None]
    first: int = -1  # part of this input
    told: set[int] = field(default_factory=set)  # parts that were ticked

    @property
    def index(self) -> Index:
        return self.writer.index

    def walk(self, conversations: Iterable[Conversation]) -> bool:
        """Work on every chunk that is open and that nobody holds; True when the input is finished."""
        digests, count, busy = [], 0, False
        held: deque[_Held] = deque()  # some are rendered while the target reads another
        try:
            for chunk in self._chunks(conversations):
                digests.append(chunk.digest)
                count += len(chunk.conversations)
                if self.index.is_done(chunk.number):
                    if chunk.number not in self.told:
                        self.told.add(chunk.number)
                        self.tick(len(chunk.conversations), 0)
                    continue
                lock = self._lock(chunk)
                busy |= lock is None
                if lock is not None and not self.index.is_done(chunk.number):
                    held.append(_Held(chunk, lock, self.rendering.ask(chunk)))
                elif lock is not None:
                    lock.release()
                while len(held) > self.rendering.ahead:
                    self._one(held.popleft())
            while held:
                self._one(held.popleft())
        finally:
            for left in held:
                left.lock.release()
        if not digests:
            raise FeatureStoreError("none of 0 conversations has an answer; give others")
        self.index.refresh()
        if busy or not all(self.index.is_done(self.first + i) for i in range(len(digests))):
            return False
        self._finish(digests, count)
        return True

    def report(self) -> CaptureReport:
        """What the store holds of the input. Raises FeatureStoreError when nothing of it can be learnt."""
        parts = range(self.first, self.first + self.index.inputs[self.first]["parts"])
        counts, too_long, tokens = added(self.index.parts[p] for p in parts)
        report = CaptureReport(sum(self.index.parts[p]["records"] for p in parts), tokens, too_long, counts)
        if not report.samples:
            unanswered = counts.without_answer == counts.conversations
            none = f"none of {counts.conversations} conversations has an answer that can be learnt"
            mend = "answer them with `draftkit generate` first" if unanswered else "give others"
            raise FeatureStoreError(f"{none} ({report.left_out()}); {mend}")
        return report

    def _chunks(self, conversations: Iterable[Conversation]) -> Iterator[Chunk]:
        """Chunks with their numbers in the store: the first one says which input this is."""
        found = chunks(conversations, 0, 0)
        if (first := next(found, None)) is None:
            return
        place, ordinal = self._place_of(first)
        self.first = place
        for chunk in _chain(first, found):
            moved = Chunk(place + chunk.number, ordinal + chunk.first, chunk.conversations, chunk.digest)
            there = self.index.inputs.get(place)
            begun = self.index.begun.get(moved.number, chunk.digest)
            if (there and chunk.number >= there["parts"]) or begun != chunk.digest:
                raise self._other()
            yield moved

    def _place_of(self, first: Chunk) -> tuple[int, int]:
        """The first part of the input that begins with a chunk, and the number of its first conversation."""
        for place, note in self.index.inputs.items():
            if self.index.parts[place]["digest"] == first.digest:
                return place, note["first_conversation"]
        if self.index.inputs and not self.append:
            raise self._other()
        last = max(self.index.inputs.values(), key=lambda note: int(note["first"]), default=None)
        if last is None:
            return 0, 0
        return last["first"] + last["parts"], last["first_conversation"] + last["conversations"]

    def _other(self) -> FeatureStoreError:
        return FeatureStoreError(
            f"{self.writer.folder}: holds a store of other conversations; choose another folder, remove it, "
            "or give --append to add these to a finished one"
        )

    def _lock(self, chunk: Chunk) -> FileLock | None:
        """The lock of a chunk's part, None when another process works on it."""
        lock = lock_of(self.writer.folder / WORK / f"part-{chunk.number:06d}.lock")
        if lock is not None:
            self.index.refresh()  # another process may have finished it meanwhile
        return lock

    def _one(self, held: _Held) -> None:
        """Work on a chunk and let go of it."""
        chunk = held.chunk
        try:
            part = held.texts()
            if chunk.number not in self.index.begun:
                self.writer.note({"begun": chunk.number, "digest": chunk.digest})
            self.told.add(chunk.number)
            self._write(chunk.number, part, len(chunk.conversations))
            note = {"part": chunk.number, "records": len(part.texts), "digest": chunk.digest}
            self.writer.note(note | part.note())
        finally:
            held.lock.release()

    def _write(self, number: int, part: PartTexts, conversations: int) -> None:
        """Write what is missing of a part; what is read together does not depend on what is there. Meanwhile
        the index is the thread's. Its `conversations` are ticked by the share of its texts."""
        done = 0
        there = self.index.keys_of(number)
        missing = [t for t in part.texts if t.key not in there]
        check_room(self.writer.folder, sum(self.manifest.form.record_bytes(t) for t in missing))
        numbered = [(i, len(text.tokens_E)) for i, text in enumerate(part.texts)]
        try:
            for batch in batches(numbered, self.settings.batch_tokens):
                texts = [part.texts[i] for i in batch]
                if any(t.key not in there for t in texts):
                    self._put(number, texts, there)
                ticked = conversations * done // len(part.texts)
                done += len(batch)
                read = sum(len(t.tokens_E) for t in texts)
                self.tick(conversations * done // len(part.texts) - ticked, read)
            if not part.texts:
                self.tick(conversations, 0)
        finally:  # nothing is written any more when the part's lock is released
            self.thread.drain()

    def _put(self, number: int, texts: list[Text], there: set[Key]) -> None:
        """Read texts, and hand over those that are not there."""
        form = self.manifest.form
        read: list[Any] = self.reader.read(texts) if self.reader else [(None, None)] * len(texts)
        wanted = [(t, pair) for t, pair in zip(texts, read, strict=True) if t.key not in there]
        device = read[0][0].device if self.reader else torch.device("cpu")
        encode = partial(_encoded, form, number, wanted)
        self.thread.put(device, encode, self.writer.add)

    def _finish(self, digests: list[str], conversations: int) -> None:
        """Say in the index that the input is finished, once."""
        lock = None
        while lock is None and self.first not in self.index.inputs:
            lock = lock_of(self.writer.folder / WORK / "finish.lock")
            self.index.refresh()
        if self.first not in self.index.inputs:
            before = [n for place, n in self.index.inputs.items() if place < self.first]
            note = {"input": True, "first": self.first, "parts": len(digests), "conversations": conversations}
            note |= {"first_conversation": sum(n["conversations"] for n in before)}
            digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
            self.writer.note(note | {"digest": digest})
        if lock is not None:
            lock.release()


def _encoded(form: RecordForm, number: int, wanted: list[Any]) -> list[tuple[Text, int, bytes]]:
    return [(text, number, form.encode(text, *pair)) for text, pair in wanted]


def _chain(first: Chunk, rest: Iterator[Chunk]) -> Iterator[Chunk]:
    yield first
    yield from rest

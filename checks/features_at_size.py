"""A feature store of a million samples: what writing, opening and the first steps take.

    python -m checks.features_at_size --work /tmp/size --records 1000000 --tokens 256

Synthetic records (random ids, vectors of 8 numbers for one layer) go through the store's own writer, in parts
as capture has them; given again, it goes on where it was. Then, each in a process of its own: capture of as
many conversations up to its first forward pass, and training up to its first step, with batches of 512 and of
8, micro-batches of one row. Peak memory is the process's own (VmHWM), bytes are those that `read` gave it
(/proc/self/io).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_file import print_result
from draftkit.data.messages import Conversation, Message, WrittenTurn
from draftkit.features.capture import capture
from draftkit.features.manifest import StoreManifest, begin_store
from draftkit.features.record import Text
from draftkit.features.store import FeatureStore
from draftkit.features.texts import PART, PartTexts
from draftkit.features.writer import StoreWriter
from draftkit.settings import CaptureSettings
from draftkit.target.interface import TargetInfo
from draftkit.target.prompt_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer
from draftkit.train.batches import BatchMaker, Cut, split_source

HIDDEN = 8
INFO = TargetInfo("synthetic", None, "synthetic", 1000, HIDDEN, 4, (), 8192, "none")


def manifest() -> StoreManifest:
    """Of the synthetic store."""
    names = {name: name for name in ("target", "fingerprint", "template_hash", "tokenizer_hash")}
    return StoreManifest(
        **names,
        feature_layers=(1,),
        dtype="bfloat16",
        hidden_size=HIDDEN,
        max_length=8192,
        cut_answers="keep",
    )


class TimedWriter(StoreWriter):
    """Adds up the seconds of its index."""

    seconds = 0.0

    def note(self, *notes: dict[str, Any]) -> None:
        """See `StoreWriter`."""
        begun = time.perf_counter()
        super().note(*notes)
        self.seconds += time.perf_counter() - begun


def write(folder: Path, records: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Write parts until all records are there, or the time is over."""
    begun, form = time.perf_counter(), begin_store(folder, manifest()).form
    mask, count = torch.arange(tokens) >= tokens // 2, 0
    features, hidden = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    with TimedWriter(folder) as writer:
        parts = -(-records // PART)
        for part in range(parts):
            if writer.index.is_done(part):
                continue
            if time.perf_counter() - begun > seconds:
                return {"finished": False, "parts": part}
            numbers = range(part * PART, min(records, (part + 1) * PART))
            ids = torch.randint(1000, (len(numbers), tokens), generator=generator)
            texts = [
                Text((n, 0, 0), f"conversation-{n}", "chat", ids[i], mask) for i, n in enumerate(numbers)
            ]
            writer.add([(text, part, form.encode(text, features, hidden)) for text in texts])
            note = {"part": part, "records": len(texts), "digest": str(part)}
            writer.note(note | PartTexts(texts).note())
            count += len(texts)
        if not writer.index.inputs:
            about = {"first": 0, "parts": parts, "conversations": records, "first_conversation": 0}
            writer.note({"input": True, "digest": "all"} | about)
    return {
        "finished": True,
        "records_here": count,
        "seconds_here": time.perf_counter() - begun,
        "seconds_of_index": writer.seconds,
        "peak_mb": peak_mb(),
    }


def open_and_step(folder: Path, batch: int, micro: int | None) -> dict[str, Any]:
    """From nothing to the micro-batches of step 0."""
    begun = time.perf_counter()
    store = FeatureStore(folder)
    opened, read_before = time.perf_counter(), bytes_read()
    split = split_source(store, 0.04, 0)
    maker = BatchMaker(store, split.train, batch, 64, 0, Cut(None, micro))
    rows = sum(len(made.tokens_BT) for made in maker.batches(0))
    first, read = time.perf_counter(), bytes_read() - read_before
    own = sum(store.record(i).size for i in maker.samples(0))
    for step in (1, 2, 3):
        for _ in maker.batches(step):
            pass
    return {
        "batch": batch,
        "micro": micro,
        "rows": rows,
        "seconds_to_open": opened - begun,
        "seconds_to_first_step": first - begun,
        "read_over_own": read / own,
        "loader_ms_per_step": (time.perf_counter() - first) / 3 * 1e3,
        "peak_mb": peak_mb(),
    }


def first_forward(folder: Path, records: int, tokens: int) -> dict[str, Any]:
    """Capture of a million records, up to what the target reads first."""
    ids = tuple(range(3, 3 + tokens // 2))
    turn = WrittenTurn(ids, ids)

    talk = (Message("user", "x"), Message("assistant", "y"))

    def conversations() -> Iterator[Conversation]:
        for n in range(records):
            yield Conversation(f"c{n}", "chat", talk, turns=(turn,))

    class Stop(Exception):
        pass

    class FirstForward:
        def read(self, texts: Sequence[Text]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            raise Stop

    begun = time.perf_counter()
    shown = TemplateFormat(load_tokenizer("tiny"))
    with contextlib.suppress(Stop):
        capture(INFO, FirstForward(), shown, conversations(), folder, (1,), CaptureSettings())
    return {"seconds_to_first_forward": time.perf_counter() - begun, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The most memory this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bytes_read() -> int:
    """Bytes that read calls gave this process."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    """Run one stage in this process, or all of them in processes of their own; print one JSON object."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=100, help="of writing; given again, it goes on")
    parser.add_argument("--only", choices=["write", "step", "forward"])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--micro", type=int)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    folder = options.work / "store"
    if options.only == "write":
        print(json.dumps(write(folder, options.records, options.tokens, options.seconds)))
    elif options.only == "step":
        print(json.dumps(open_and_step(folder, options.batch, options.micro)))
    elif options.only == "forward":
        print(json.dumps(first_forward(options.work / "forward", options.records, options.tokens)))
    else:
        again = [sys.executable, "-m", "checks.features_at_size", "--work", str(options.work)]
        again += ["--records", str(options.records), "--tokens", str(options.tokens)]
        again += ["--seconds", str(options.seconds), "--only"]
        run = lambda *words: json.loads(subprocess.check_output([*again, *words]))  # noqa: E731
        found = {"write": run("write")}
        if found["write"]["finished"]:
            steps = [run("step", "--batch", str(b), "--micro", "1") for b in (512, 8)]
            found |= {"forward": run("forward"), "steps": steps}
            size = sum(path.stat().st_size for path in folder.glob("shard-*"))
            index = sum(path.stat().st_size for path in folder.glob("index-*"))
            found |= {"bytes": {"shards": size, "index": index}}
        print_result(found | {"records": options.records, "tokens": options.tokens}, options.out)


if __name__ == "__main__":
    main()

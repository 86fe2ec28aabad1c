"""A million conversations through generation and the reading of capture, killed on the way: memory, the
time until the first question goes out, and the time until it goes on.

    python -m checks.many_records --work many --count 1000000 --kill-after 90

Answers come from a stub at once, so that what is measured is the work on the files: reading prompts,
rendering, tokenising, records, parts, locks, joining. The process is killed with SIGKILL every
`--kill-after` seconds and started again, until all is answered; then the records are read as capture reads
them, into samples. The check itself may be stopped and given again. Prints one line of JSON; exit code 1
when a record is missing or there twice, or a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from draftkit.data.answers import Answer, Answers, Question
from draftkit.data.conversations import iterate_conversations, iterate_rows
from draftkit.data.generate import generate_file
from draftkit.data.records import made_with
from draftkit.features.texts import chunks, rendered
from draftkit.settings import CaptureSettings, GenerateSettings
from draftkit.target.interface import TargetInfo
from draftkit.target.place import EMBEDDED
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer

MOST_MEMORY, FIRST_SECONDS, RESUME_SECONDS = 2 * 2**30, 60.0, 30.0
ANSWER = tuple(range(20, 28))
SETTINGS = GenerateSettings(max_new_tokens=16)


class Stub(Answers):
    """Answers whatever is asked with the same eight tokens; notes when the first question came."""

    def __init__(self, note: Path, began: float) -> None:
        self._asked: list[str] = []
        self._note, self._began, self._first = note, began, True

    @property
    def room(self) -> int:
        """As many as an engine would take."""
        return 256 - len(self._asked)

    def ask(self, question: Question, settings: GenerateSettings) -> None:
        """Take it."""
        if self._first:
            self._first = False
            told(self._note, first_seconds=time.time() - self._began)
        self._asked.append(question.key)

    def finished(self) -> list[tuple[str, Answer]]:
        """All that was asked."""
        asked, self._asked = self._asked, []
        return [(key, Answer(ANSWER, "stop")) for key in asked]


def told(note: Path, **what: Any) -> None:
    """One more line of notes."""
    with note.open("a") as file:
        file.write(json.dumps(what) + "\n")


def peak_bytes() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def watch(note: Path) -> None:
    """Note the peak of memory every few seconds: nobody tells that of a process that was killed."""

    def look() -> None:
        while True:
            time.sleep(2)
            told(note, peak=peak_bytes())

    threading.Thread(target=look, daemon=True).start()


def generate(work: Path, count: int, began: float) -> None:
    """Answer all prompts, by the stub."""
    note = work / "notes.jsonl"
    watch(note)
    shown = TemplateFormat(load_tokenizer(str(EMBEDDED)))
    about = made_with(shown, "a stub", (), SETTINGS)
    prompts = lambda first: iterate_rows([work / "prompts.jsonl"], first=first)  # noqa: E731
    report = generate_file(Stub(note, began), shown, prompts, work / "answers.jsonl", SETTINGS, about)
    told(note, peak=peak_bytes(), records=report.records)


def capture(work: Path) -> None:
    """Read all records into texts, as capture does before the target reads them."""
    shown, began, samples = TemplateFormat(load_tokenizer(str(EMBEDDED))), time.monotonic(), 0
    info = TargetInfo("stub", None, "stub", len(shown.tokenizer), 8, 4, (), 4096, "none")
    for chunk in chunks(iterate_conversations([work / "answers.jsonl"]), 0, 0):
        samples += len(rendered(chunk, shown, info, CaptureSettings()).texts)
    seconds = time.monotonic() - began
    told(work / "notes.jsonl", capture_peak=peak_bytes(), capture_seconds=seconds, samples=samples)


def write_prompts(path: Path, count: int) -> None:
    """So many short prompts, each another one."""
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        for i in range(count):
            row = {"id": f"p{i}", "messages": [{"role": "user", "content": f"What is {i} + {i // 7}?"}]}
            file.write(json.dumps(row) + "\n")
    partial.replace(path)


def child(work: Path, count: int, stage: str, seconds: float | None) -> int:
    """A stage in a process of its own, killed after a while; its exit code."""
    command = [sys.executable, "-m", "checks.many_records", "--work", str(work), "--count", str(count)]
    process = psutil.Popen([*command, "--stage", stage])
    try:
        return int(process.wait(seconds))
    except psutil.TimeoutExpired:
        process.kill()
        return int(process.wait())


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="an empty folder, or that of an earlier call"
    )
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--kill-after", type=float, default=90.0, help="seconds")
    parser.add_argument("--stage", choices=("generate", "capture"), help="for the processes that this starts")
    given = parser.parse_args()
    if given.stage == "generate":
        return generate(given.work, given.count, psutil.Process().create_time())
    if given.stage == "capture":
        return capture(given.work)
    given.work.mkdir(parents=True, exist_ok=True)
    write_prompts(given.work / "prompts.jsonl", given.count)
    note = given.work / "notes.jsonl"
    while not any("records" in line for line in notes(note)):
        code = child(given.work, given.count, "generate", given.kill_after)
        if code > 0:
            sys.exit(f"generate ended with {code}")
    if child(given.work, given.count, "capture", None):
        sys.exit("capture's reading failed")
    sys.exit(summary(given.work, given.count))


def notes(note: Path) -> list[dict[str, Any]]:
    """What the processes have noted; a line that a kill has torn is left out."""
    lines = note.read_bytes().splitlines(keepends=True) if note.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"}\n")]


def summary(work: Path, count: int) -> int:
    """Print what was found; 1 where a limit is missed."""
    found = notes(work / "notes.jsonl")
    first, *again = [line["first_seconds"] for line in found if "first_seconds" in line]
    with (work / "answers.jsonl").open("rb") as file:
        ids = [line[8 : line.index(b'"', 8)] for line in file]
    last = next(line for line in reversed(found) if "samples" in line)
    result = {
        "records": len(ids),
        "different": len(set(ids)),
        "kills": len(again),
        "first_request_seconds": round(first, 1),
        "slowest_resume_seconds": round(max(again, default=0.0), 1),
        "generate_peak_gib": round(max(line["peak"] for line in found if "peak" in line) / 2**30, 2),
        "capture_peak_gib": round(last["capture_peak"] / 2**30, 2),
        "capture_reading_seconds": round(last["capture_seconds"]),
        "samples": last["samples"],
    }
    print(json.dumps(result))
    whole = result["records"] == result["different"] == result["samples"] == count
    small = max(result["generate_peak_gib"], result["capture_peak_gib"]) * 2**30 <= MOST_MEMORY
    soon = first <= FIRST_SECONDS and result["slowest_resume_seconds"] <= RESUME_SECONDS
    return int(not (whole and small and soon))


if __name__ == "__main__":
    main()

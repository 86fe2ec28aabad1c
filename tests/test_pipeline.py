"""Generate, capture and train from files to files: interruptions, damage and mismatches."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from checks.forked import finished, start
from support import stopping
from support.records import prompts


def words(target_folder: Path, *arguments: str) -> list[str]:
    """A command with its settings, without the program."""
    settings = [
        f"target.path={target_folder}",
        "drafter.num_features=2",
        "generate.max_new_tokens=40",
        "generate.batch_size=2",
    ]
    settings += ["train.epochs=100000", "train.validate_every=5", "drafter.num_layers=1"]
    return [*arguments, *(x for s in settings for x in ("--set", s))]


def write_prompts(path: Path, count: int) -> Path:
    rows = [{"id": p.id, "domain": p.domain, "messages": p.as_dicts()} for p in prompts(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def steps_done(drafter: Path) -> int:
    """The step of the saved state; 0 while there is none (or while it is being swapped)."""
    try:
        return int(json.loads((drafter / "state" / "position.json").read_text())["step"])
    except FileNotFoundError:
        return 0


def done(command: list[str], log: Path) -> None:
    """Run a command to its end."""
    code, told = finished(command, log)
    assert code == 0, told


def ended(command: list[str], log: Path, place: str, count: int, number: signal.Signals) -> tuple[int, str]:
    """Run a command that is sent the signal after so many calls of a function; its exit code and what it
    printed."""
    process = start(command, log, before=partial(stopping.signal_at, place, count))
    assert process.pid is not None and process.exitcode is None
    stopping.wait_for_stop(process.pid)
    os.kill(process.pid, number)
    if number != signal.SIGKILL:  # which needs no more
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text()


@pytest.mark.slow
def test_generate_survives_sigkill_with_the_same_records(target_folder: Path, tmp_path: Path) -> None:
    """A real process, killed when it has written something, ends with what one run gives."""
    source = write_prompts(tmp_path / "prompts.jsonl", 40)
    whole, killed, log = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl", tmp_path / "log"
    arguments = ["generate", "-p", str(source), "-o"]
    done(words(target_folder, *arguments, str(whole)), log)
    code, _ = ended(words(target_folder, *arguments, str(killed)), log, stopping.ANSWERS, 5, signal.SIGKILL)
    assert code == -signal.SIGKILL
    left = sum(
        len(p.read_bytes().splitlines()) for p in killed.with_name("killed.jsonl.parts").glob("*.jsonl")
    )
    assert 0 < left < 40, "it was killed in the middle"
    done(words(target_folder, *arguments, str(killed)), log)
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_signals_end_every_stage_in_order_and_it_goes_on(target_folder: Path, tmp_path: Path) -> None:
    """SIGINT and SIGTERM in turn."""
    source, log = write_prompts(tmp_path / "prompts.jsonl", 40), tmp_path / "log"
    generated, features, drafter = tmp_path / "answers.jsonl", tmp_path / "features", tmp_path / "drafter"
    generate = words(target_folder, "generate", "-p", str(source), "-o", str(generated))
    code, told = ended(generate, log, stopping.ANSWERS, 3, signal.SIGINT)
    assert code == 130, told
    assert told.splitlines()[-1] == "error: interrupted; run the same command again to go on"
    small, answers, long = (
        write_prompts(tmp_path / "small.jsonl", 8),
        tmp_path / "a.jsonl",
        tmp_path / "long.jsonl",
    )
    done(words(target_folder, "generate", "-p", str(small), "-o", str(answers)), log)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    rows = [r for r in rows if r["messages"][-1]["role"] == "assistant"]
    for row in rows:
        del row["record_digest"]  # they get other ids
    long.write_text("".join(json.dumps(r | {"id": f"{r['id']}-{i}"}) + "\n" for i in range(40) for r in rows))
    reading = words(target_folder, "capture", "-c", str(long), "-o", str(features))
    code, told = ended(reading, log, stopping.RECORDS, 1, signal.SIGTERM)
    assert code == 143, told
    code, told = finished(words(target_folder, "capture", "-c", str(answers), "-o", str(features)), log)
    assert code == 2, f"a store of other conversations is not mixed in: {told}"
    done(words(target_folder, "capture", "-c", str(answers), "-o", str(tmp_path / "f")), log)
    train = words(target_folder, "train", "-f", str(tmp_path / "f"), "-o", str(drafter))
    code, told = ended(train, log, stopping.STATES, 1, signal.SIGINT)
    assert code == 130, told
    before = steps_done(drafter)
    assert before > 0
    code, told = ended(train, log, stopping.STATES, 1, signal.SIGTERM)
    assert code == 143, told
    assert steps_done(drafter) > before, "it went on, not back"
    assert (drafter / "best" / "config.json").exists()

"""Stages killed with SIGKILL at random moments, at least half of them while a file is being written: the same
command goes on from there, and ends with the same artefacts as a run that nobody killed.

    python -m checks.kill_stages --work kills --count 40 --seed 0

A kill "while a file is being written" is one that left a `.partial`, `.new` or `.part` file, or a torn last
line, after it. Prints one line of JSON; exit code 1 when a stage could not go on, or ended with other
artefacts.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from checks.small_run import DRAFTKIT, Stage, readers, run, stages, told

# the same in every run; `calibrate` and `profile` write one file at the end
STAGES = ("generate", "capture", "train")
HALF_WRITTEN = ("*.partial", "*.new", "*.part")


def being_written(work: Path, stage: Stage) -> bool:
    """Whether something of the stage's is half there at this moment."""
    if any(next(work.rglob(pattern), None) for pattern in HALF_WRITTEN):
        return True
    return stage.out.is_file() and stage.out.stat().st_size > 0 and not stage.out.read_bytes().endswith(b"\n")


def kill_once(work: Path, stage: Stage, chance: random.Random, wait_for_write: bool, longest: float) -> str:
    """Start the stage, kill it, and say when that was."""
    process = subprocess.Popen(
        [*DRAFTKIT, *stage.command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + chance.uniform(0.2, 1) * longest
    while process.poll() is None and time.monotonic() < (until + longest if wait_for_write else until):
        if wait_for_write and time.monotonic() > until - longest and being_written(work, stage):
            break
        time.sleep(0 if wait_for_write else 0.01)
    if process.poll() is not None:
        return "ended before"
    process.kill()
    process.wait()
    return "while writing" if being_written(work, stage) else "between writes"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance, seconds = random.Random(given.seed), {}
    right_work, work = given.work / "right", given.work / "killed"
    for stage in stages(right_work):
        began = time.monotonic()
        done = run(stage)
        seconds[stage.name] = time.monotonic() - began
        if done.returncode:
            sys.exit(f"{stage.name}: {done.stderr}")
    right = {path.relative_to(right_work): told(read()) for path, read in readers(right_work).items()}
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    while outcomes["while writing"] + outcomes["between writes"] < given.count and not wrong:
        shutil.rmtree(work, ignore_errors=True)
        for stage in stages(work):
            for _ in range(3 * (stage.name in STAGES)):
                kills = outcomes["while writing"] + outcomes["between writes"]
                writing = outcomes["while writing"] * 2 <= kills
                outcomes[kill_once(work, stage, chance, writing, seconds[stage.name])] += 1
            done = run(stage)
            if done.returncode:
                wrong.append(f"{stage.name}: {done.stderr[-300:]}")
                break
        if not wrong:
            found = {path.relative_to(work): told(read()) for path, read in readers(work).items()}
            # seconds are in states, and speeds in what was measured
            same = ("answers.jsonl", "manifest.json")
            wrong += [str(p) for p in right if p.name in same and found.get(p) != right[p]]
    print(json.dumps({"kills": dict(outcomes), "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

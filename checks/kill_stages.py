"""Stages ended from outside at random moments, half of them in the middle of a write: the same command
goes on from there, and ends with the same files as a run that nobody ended.

    python -m checks.kill_stages --work kills --count 40 --seed 0

Half of the kills are SIGKILLs after a random time. The other half come in the middle of a write: the
system ends the process at a random byte of the file that it writes (RLIMIT_FSIZE with SIGXFSZ, which runs
no more of the process than SIGKILL does), so that a torn file or line is left. `--work` may hold the
finished run of an earlier call. Prints one line of JSON; exit code 1 when a stage could not go on, or
ended with other files.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checks.forked import Disk, finished, start
from checks.small_run import Stage, stages

SAME = {  # stages whose files are the same in every run, and these
    "generate": "answers.jsonl",
    "capture": "features/shard-*.bin",
    "train": "drafter/best/model.safetensors",
}
STAGES = tuple(SAME)
KILLS = 3  # of each stage in a run
PROMPTS = 24


def killed_after(stage: Stage, seconds: float, log: Path) -> str:
    """Kill the stage after a while; what became of it."""
    process = start(stage.command, log)
    process.join(seconds)
    if process.exitcode is not None:
        return "ended before"
    process.kill()
    process.join()
    return "between writes"


def killed_in_a_write(stage: Stage, most_bytes: int, log: Path) -> str:
    """Let the system end the stage where a file would grow beyond so many bytes; what became of it."""
    code, _ = finished(stage.command, log, Disk(most_bytes, deadly=True))
    return "while writing" if code == -signal.SIGXFSZ else "ended before"


def largest(*places: Path) -> int:
    """Bytes of the largest file in some folders."""
    files = [f for place in places for f in (place.rglob("*") if place.is_dir() else [place]) if f.is_file()]
    return max((f.stat().st_size for f in files), default=0)


def result(work: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """The files of some stages that must be the same."""
    files = [file for stage in wanted for file in sorted(work.glob(SAME[stage]))]
    return {str(file.relative_to(work)): file.read_bytes() for file in files}


@dataclass
class Told:
    """What was done and found: kills by moment and by stage, and what went wrong after them."""

    files: int
    moments: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Of stages that had not ended before."""
        return self.stages.total()


def killed_run(
    work: Path,
    only: str | None,
    seconds: dict[str, float],
    sizes: dict[str, int],
    chance: random.Random,
    log: Path,
    told: Told,
) -> None:
    """One run of the stages, each killed some times and then let go on to its end."""
    for stage in stages(work, PROMPTS)[: len(seconds)]:
        for _ in range(KILLS if only in (None, stage.name) else 0):
            parts = stage.out.with_name(stage.out.name + ".parts")
            began = time.monotonic()
            if told.moments["while writing"] <= told.moments["between writes"]:
                now = largest(parts if parts.exists() else stage.out)
                most = now + chance.randrange(1, max(2, sizes[stage.name] - now))
                moment = killed_in_a_write(stage, most, log)
            else:
                moment = killed_after(stage, chance.uniform(0.1, 1) * seconds[stage.name], log)
            told.moments[moment] += 1
            told.stages[stage.name] += moment != "ended before"
            if moment == "ended before":  # nothing is left to kill, and it takes less time than was thought
                seconds[stage.name] = min(seconds[stage.name], time.monotonic() - began)
                break
        code, said = finished(stage.command, log)
        if code:
            told.wrong.append(f"{stage.name}: {said[-300:]}")
            return


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="an empty folder, or that of an earlier call"
    )
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=STAGES, help="kill this stage alone")
    given = parser.parse_args()
    chance, seconds = random.Random(given.seed), {}
    right_work, work, log = given.work / "right", given.work / "killed", given.work / "log"
    wanted = STAGES[: STAGES.index(given.only) + 1] if given.only else STAGES
    sizes: dict[str, int] = {}
    for stage in stages(right_work, PROMPTS)[: len(wanted)]:
        began = time.monotonic()
        code, said = finished(stage.command, log)
        if code:
            sys.exit(f"{stage.name}: {said}")
        noted = given.work / f"{stage.name}.seconds"  # an earlier call's: a finished stage takes no time
        if not noted.exists():
            noted.write_text(str(time.monotonic() - began), "ascii")
        seconds[stage.name], sizes[stage.name] = float(noted.read_text("ascii")), largest(stage.out)
    right = result(right_work, wanted)
    told = Told(files=len(right))
    try:
        while told.kills < given.count and not told.wrong:
            shutil.rmtree(work, ignore_errors=True)
            killed_run(work, given.only, seconds, sizes, chance, log, told)
            found = result(work, wanted)
            told.wrong += sorted(n for n in right.keys() | found.keys() if found.get(n) != right.get(n))
            print(f"{told.kills} of {given.count} kills", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped: these are the kills so far", file=sys.stderr)
    counts = {"kills": dict(told.moments), "stages": dict(told.stages)}
    print(json.dumps(counts | {"files": told.files, "wrong": told.wrong}))
    sys.exit(bool(told.wrong) or told.kills < given.count)


if __name__ == "__main__":
    main()

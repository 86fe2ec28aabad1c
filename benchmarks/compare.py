"""Arms of a comparison, trained on one feature store for the same number of steps and measured on the same
prompts.

    python -m benchmarks.compare --group table1 --features features --out runs/table1 --steps 2000

Every arm and seed is one `draftkit train` and one `draftkit evaluate` at temperature 1, each with one thread,
a few at a time; the drafter of the last step counts. A run whose result is there is skipped, an interrupted
one goes on. Then `--results` gets the JSON and a plot of acceptance by position. Groups are in arms.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress

from benchmarks.compare_report import Arm, build_report, plot_report, print_table
from benchmarks.result_file import write_result

ARMS = Path(__file__).with_name("arms.yaml")
RESULT = Path("results") / "evaluate-T1.json"


@dataclass(frozen=True)
class Run:
    """One arm with one seed: its folder and the commands that fill it, in order."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return (self.folder / RESULT).exists()


def plan_run(group: dict[str, Any], arm: str, seed: int, options: argparse.Namespace) -> Run:
    """The commands of one arm and seed."""
    folder = options.out / f"{arm}-s{seed}"
    values = {
        "train.steps": options.steps,
        "train.validate_every": max(1, options.steps // 4),
        "train.seed": seed,
    }
    values |= {"train.decode_prompts": 0, "train.keep_checkpoints": 0}
    values |= {"evaluate.temperatures": [1.0], "evaluate.speed_prompts": 0}
    values |= {"evaluate.max_new_tokens": options.tokens, "evaluate.prompts_per_domain": options.prompts}
    values |= group["arms"][arm]
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    sets = [part for key, text in texts.items() for part in ("--set", f"{key}={text}")]
    start = (sys.executable, "-m", "draftkit.cli")
    train = (*start, "train", "-r", group["recipe"], *sets, "-f", str(options.features), "-o", str(folder))
    drafter, results = folder / "last", folder / RESULT.parent
    evaluate = (*start, "evaluate", "-r", group["recipe"], *sets, "-d", str(drafter), "-o", str(results))
    if options.heldout:
        evaluate += ("-p", str(options.heldout))
    return Run(f"{arm} seed {seed}", folder, (train, evaluate))


def claim_folder(run: Run) -> None:
    """Make the folder, or refuse one that was filled by other commands: its result would be taken for this
    one's."""
    run.folder.mkdir(parents=True, exist_ok=True)
    plan, commands = run.folder / "commands.json", json.dumps(run.commands, indent=1)
    if plan.exists() and plan.read_text("utf-8") != commands:
        raise SystemExit(
            f"error: {run.folder}: was made with other options; choose another --out or remove it"
        )
    plan.write_text(commands, encoding="utf-8")


def start_runs(runs: Sequence[Run]) -> Iterator[tuple[Run, subprocess.Popen[bytes]]]:
    """Start a run's first command when asked for the next one."""
    for run in runs:
        yield run, start_command(run, 0)


def start_command(run: Run, index: int) -> subprocess.Popen[bytes]:
    """Start one command with one thread; what it prints goes into the run's folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (run.folder / "output.txt").open("ab") as log:
        return subprocess.Popen(run.commands[index], stdout=log, stderr=log, env=environment)


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Run all, `jobs` at a time. The first failure, or a signal, ends the others in their orderly way."""
    waiting = start_runs(runs)
    active: list[tuple[Run, int, subprocess.Popen[bytes]]] = []
    left = len(runs)
    try:
        with Progress() as bar:
            task = bar.add_task("runs", total=left)
            while left:
                while len(active) < jobs and (started := next(waiting, None)):
                    active.append((started[0], 0, started[1]))
                time.sleep(0.2)
                for item in list(active):
                    run, index, process = item
                    if process.poll() is None:
                        continue
                    active.remove(item)
                    if process.returncode:
                        tail = (run.folder / "output.txt").read_text("utf-8").strip().splitlines()[-1:]
                        raise SystemExit(
                            f"error: {run.name} ended with {process.returncode}: {' '.join(tail)}"
                        )
                    if index + 1 < len(run.commands):
                        active.append((run, index + 1, start_command(run, index + 1)))
                    else:
                        left -= 1
                        bar.update(task, advance=1)
    finally:
        for _, _, process in active:
            process.terminate()
        for _, _, process in active:
            process.wait()


def read_arm(name: str, runs: Sequence[Run]) -> Arm:
    """The records of all seeds of an arm."""
    return Arm(name, tuple(json.loads((run.folder / RESULT).read_text("utf-8"))["records"] for run in runs))


def parse_options() -> argparse.Namespace:
    """Options with defaults that the numbers in benchmarks/results were made with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", default="table1", choices=list(yaml.safe_load(ARMS.read_text("utf-8"))))
    parser.add_argument("--arms", nargs="+", help="only these arms of the group; the baselines are added")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every arm, unless it sets the key"
    )
    parser.add_argument("--features", type=Path, required=True, help="feature store of the group's recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument(
        "--results", type=Path, help="JSON to write; the plot lies beside it; default: in --out"
    )
    parser.add_argument("--heldout", type=Path, help="prompts (JSONL); default: the embedded held-out ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=100, help="per domain")
    parser.add_argument("--tokens", type=int, default=96, help="per answer")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    return parser.parse_args()


def main() -> None:
    """Train, measure, and print the table."""
    options = parse_options()
    group = yaml.safe_load(ARMS.read_text("utf-8"))[options.group]
    # as text: 3e-3 is a number
    common = {key: value for key, _, value in (text.partition("=") for text in options.set)}
    group["arms"] = {arm: common | values for arm, values in group["arms"].items()}
    chosen = [a for a in group["arms"] if not options.arms or a in options.arms or a in group["baselines"]]
    unknown = set(options.arms or ()) - set(group["arms"])
    if unknown:
        raise SystemExit(
            f"error: no arm {', '.join(sorted(unknown))} in {options.group}; there are "
            f"{', '.join(group['arms'])}"
        )
    plans = {arm: [plan_run(group, arm, seed, options) for seed in options.seeds] for arm in chosen}
    for run in (run for arm in chosen for run in plans[arm]):
        claim_folder(run)
    # seeds first: after every pass over the arms there is something to compare
    pending = [plans[arm][i] for i in range(len(options.seeds)) for arm in chosen if not plans[arm][i].done]
    execute(pending, options.jobs)
    settings = {
        k: v for k, v in vars(options).items() if k in ("group", "set", "seeds", "steps", "prompts", "tokens")
    }
    arms = [read_arm(arm, plans[arm]) for arm in chosen]
    report = build_report(
        arms, group["baselines"], settings | {"recipe": group["recipe"], "arms": group["arms"]}
    )
    path = options.results or options.out / f"{options.group}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(report, path)
    plot_report(report, path.with_suffix(".png"))
    print_table(report)


if __name__ == "__main__":
    main()

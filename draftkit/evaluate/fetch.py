"""Fetching the paper's sets from the hub, once, at a commit that is written down.

Each set has a function that makes turns of a row as DeepSpec's `eval_datasets` have them. The hub's newest
commit is taken, unless the folder's manifest names one already: then that one is fetched again. Needs the
extra `data`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftkit.errors import DataError
from draftkit.evaluate.suites import MANIFEST, PAPER, PromptSet, Turns, read_set, write_manifest, write_set
from draftkit.output import make_folder

Row = Mapping[str, Any]
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SOLVE = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
EXPERT = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will "
    "generate "
    "a correct Python program that matches the specification and passes all tests. You will NOT return "
    "anything "
    "except for the program\n\n### Question:\n"
)
STARTER = "You will use the following starter code to write the solution to the problem and enclose your code"
FROM_STDIN = "Read the inputs from stdin solve the problem and write the answer to stdout"


@dataclass(frozen=True)
class Origin:
    """Where a set's rows lie on the hub, and what makes turns of one."""

    turns: Callable[[Row], Turns]
    split: str = "test"
    config: str | None = None
    files: tuple[str, ...] = ()  # data files to read instead of the default ones


def _livecodebench(row: Row) -> Turns:
    starter = row.get("starter_code")
    form = (
        f"{STARTER} within delimiters.\n```python\n{starter}\n```"
        if starter
        else f"{FROM_STDIN}.\n```python\n# YOUR CODE HERE\n```"
    )
    return (
        f"{EXPERT}{row['question_content']}\n\n### Format: {form}\n\n### Answer: (use the provided format)\n",
    )


def _alpaca(row: Row) -> Turns:
    return (f"{row['instruction']}\n\nInput:\n{row['input']}" if row.get("input") else row["instruction"],)


ORIGINS = {
    "gsm8k": Origin(lambda row: (row["question"] + BOXED,), config="main"),
    "math500": Origin(lambda row: (row["problem"] + BOXED,)),
    "aime25": Origin(lambda row: (row["problem"] + BOXED,), split="train"),
    "mbpp": Origin(lambda row: (row["prompt"],), config="sanitized"),
    "humaneval": Origin(lambda row: (f"{SOLVE}{row['prompt']}\n```",)),
    "livecodebench": Origin(_livecodebench, files=("test*.jsonl",)),
    "mt-bench": Origin(lambda row: tuple(row["prompt"]), split="train"),
    "alpaca": Origin(_alpaca, split="train"),
    "arena-hard-v2": Origin(lambda row: (row["prompt"],), files=("data/arena-hard-v2.0/question.jsonl",)),
}
Load = Callable[[PromptSet, Origin, str | None], tuple[Iterable[Row], str]]  # rows, and their commit


def fetch_suite(out: Path, load: Load | None = None) -> dict[str, int]:
    """Fetch what the folder lacks; rows by set. Raises DataError when the hub does not answer, or a set has
    other rows than the paper's."""
    make_folder(out)
    known, counts = _known(out), {}
    origins: dict[str, dict[str, str]] = {name: _kept(about) for name, about in known.items()}
    for one in PAPER:
        path = out / f"{one.name}.jsonl"
        if not path.exists():
            rows, commit = (load or load_from_hub)(
                one, ORIGINS[one.name], origins.get(one.name, {}).get("revision")
            )
            turns = [ORIGINS[one.name].turns(row) for row in rows]
            if len(turns) != one.rows:
                raise DataError(
                    f"{one.source} at {commit}: has {len(turns)} rows, the paper's set {one.rows}; give "
                    "the files of "
                    "that evaluation: draftkit suite fetch --from FOLDER"
                )
            write_set(out, one.name, turns)
            origins[one.name] = {"revision": commit}
            write_manifest(out, {name: origins[name] for name in origins if (out / f"{name}.jsonl").exists()})
        counts[one.name] = len(read_set(path, one.rows))
    return counts


def load_from_hub(one: PromptSet, origin: Origin, revision: str | None) -> tuple[Iterable[Row], str]:
    """Rows of a hub data set at a commit. Raises DataError without the package or without the hub."""
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DataError(
            f"{one.name}: needs the package datasets; run: pip install 'draftkit[data]'"
        ) from error
    try:
        commit = revision or str(HfApi().dataset_info(one.source).sha)
        files = {origin.split: list(origin.files)} if origin.files else None
        return load_dataset(
            one.source, origin.config, data_files=files, split=origin.split, revision=commit
        ), commit
    except Exception as error:  # the hub's and the network's errors have no common class
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"{one.name}: {one.source} cannot be fetched ({first}); try again with a network, or give files: "
            "draftkit suite fetch --from FOLDER"
        ) from error


def _known(out: Path) -> dict[str, dict[str, Any]]:
    path = out / MANIFEST
    try:
        return dict(json.loads(path.read_text("utf-8"))["sets"]) if path.exists() else {}
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}); remove the folder and fetch again") from error


def _kept(about: dict[str, Any]) -> dict[str, str]:
    return {name: str(about[name]) for name in ("revision", "from") if name in about}

"""Suites of benchmark prompts: the nine sets of the paper's Table 1 (arXiv 2607.05147), and which of their
rows are asked.

A suite is a folder of files such as gsm8k.jsonl with one {"turns": ["...", ...]} per line, and suite.json,
which says where each came from. Rows are drawn as DeepSpec's evaluation draws them: a set that has more
rows than are asked is shuffled by `random.Random(980406)`, and the first ones are taken; each prompt's seed
is 980406 plus its place among those drawn.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from draftkit.errors import DataError, reason
from draftkit.output import as_json, make_folder, sha256_of, write_text

MANIFEST = "suite.json"
DRAW_SEED = 980406
Turns = tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """One set of a suite: `rows` it has, `drawn` of them are asked. `source` is its id on the hub,
    `licence` what its card there says."""

    name: str
    group: str
    rows: int
    drawn: int
    source: str
    licence: str


PAPER = (
    PromptSet("gsm8k", "math", 1319, 500, "openai/gsm8k", "mit"),
    PromptSet("math500", "math", 500, 500, "HuggingFaceH4/MATH-500", "not stated"),
    PromptSet("aime25", "math", 30, 30, "MathArena/aime_2025", "cc-by-nc-sa-4.0"),
    PromptSet("mbpp", "code", 257, 256, "google-research-datasets/mbpp", "cc-by-4.0"),
    PromptSet("humaneval", "code", 164, 164, "openai/openai_humaneval", "mit"),
    PromptSet("livecodebench", "code", 1055, 500, "livecodebench/code_generation_lite", "cc"),
    PromptSet("mt-bench", "chat", 80, 80, "HuggingFaceH4/mt_bench_prompts", "apache-2.0"),
    PromptSet("alpaca", "chat", 52002, 500, "tatsu-lab/alpaca", "cc-by-nc-4.0"),
    PromptSet("arena-hard-v2", "chat", 750, 500, "lmarena-ai/arena-hard-auto", "apache-2.0"),
)


@dataclass(frozen=True)
class AskedRow:
    """A row that is asked: its place among those drawn of its set, its line in the file, and its turns."""

    place: int
    line: int
    turns: Turns


def suite_folder() -> Path:
    """Where the paper's suite lies unless another folder is given."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "draftkit" / "suites" / "paper"


def read_set(path: Path, rows: int | None = None) -> list[Turns]:
    """The turns of a file. Raises DataError for a row without turns that are texts, and when there are not
    `rows` of them."""
    try:
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}); fetch the suite again") from error
    found = [_turns(line, f"{path}, row {number}") for number, line in enumerate(lines, 1)]
    if rows is not None and len(found) != rows:
        raise DataError(f"{path}: has {len(found)} rows, the set has {rows}; copy or fetch it again")
    return found


def _turns(line: str, place: str) -> Turns:
    try:
        turns = json.loads(line)["turns"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{place}: needs an object with turns ({reason(error)})") from error
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t for t in turns):
        raise DataError(f"{place}: turns must be a list of texts, at least one")
    return tuple(turns)


def draw(rows: Sequence[Turns], count: int, seed: int = DRAW_SEED) -> list[AskedRow]:
    """The rows that are asked, in the order of asking."""
    order = list(range(len(rows)))
    if len(order) > count:
        random.Random(seed).shuffle(order)
    return [AskedRow(place, line, rows[line]) for place, line in enumerate(order[:count])]


def read_suite(folder: Path, limit: int | None = None) -> dict[str, list[AskedRow]]:
    """The rows to ask, by set, in the paper's order; at most the first `limit` of each. Sets that the folder
    lacks are left out. Raises DataError when it has none, or one with other rows than it should have."""
    found = {
        one.name: draw(read_set(path, one.rows), one.drawn)[:limit]
        for one in PAPER
        if (path := folder / f"{one.name}.jsonl").exists()
    }
    if not found:
        raise DataError(
            f"{folder}: has none of {', '.join(one.name for one in PAPER)} (.jsonl); run draftkit suite "
            "fetch, or "
            "draftkit suite fetch --from FOLDER"
        )
    return found


def missing_from(sets: Sequence[str]) -> list[str]:
    """The paper's sets that are not among these."""
    return [one.name for one in PAPER if one.name not in sets]


def copy_suite(source: Path, out: Path) -> dict[str, int]:
    """Check the files of a folder and write them with a manifest; rows by set. Raises DataError as
    `read_suite`."""
    read_suite(source)
    make_folder(out)
    counts: dict[str, int] = {}
    for one in PAPER:
        path = source / f"{one.name}.jsonl"
        if path.exists():
            rows = read_set(path, one.rows)
            write_set(out, one.name, rows)
            counts[one.name] = len(rows)
    write_manifest(out, {name: {"from": str(source / f"{name}.jsonl")} for name in counts})
    return counts


def write_set(out: Path, name: str, rows: Sequence[Turns]) -> None:
    """Write the file of one set."""
    lines = (json.dumps({"turns": list(turns)}, ensure_ascii=False) + "\n" for turns in rows)
    write_text(out / f"{name}.jsonl", "".join(lines))


def write_manifest(out: Path, origins: dict[str, dict[str, str]]) -> None:
    """Say of each file where it came from, its licence, its rows and its sha256."""
    by_name = {one.name: one for one in PAPER}
    about = {
        name: {
            "rows": by_name[name].rows,
            "source": by_name[name].source,
            "licence": by_name[name].licence,
            "sha256": sha256_of(out / f"{name}.jsonl"),
            **origin,
        }
        for name, origin in origins.items()
    }
    write_text(out / MANIFEST, as_json({"suite": "paper", "sets": about}, indent=1) + "\n")

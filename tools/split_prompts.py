"""Split folders of benchmark prompts into training and held-out prompts for the SmolLM2 pair.

    python -m tools.split_prompts FOLDER --out prompts

FOLDER holds files such as gsm8k.jsonl with one {"turns": [...]} per line. Of every domain the `--held-out`
prompts whose texts have the smallest sha256 are held out, so the split depends on the texts alone; the others
are written in a shuffled order. Writes prompts/train.jsonl and prompts/heldout.jsonl, as `draftkit generate`
and `draftkit evaluate` read them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOMAINS = {
    "code": ("humaneval", "mbpp", "livecodebench"),
    "math": ("gsm8k", "math500", "aime25"),
    "chat": ("mt-bench", "arena-hard-v2"),
}


def main() -> None:
    """Read the arguments, write both files, say how many prompts they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=120, help="prompts per domain")
    parser.add_argument("--longest", type=int, default=3000, help="characters; longer prompts are left out")
    chosen = parser.parse_args()
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for domain, suites in DOMAINS.items():
        prompts = {
            p["id"]: p for suite in suites for p in read_suite(chosen.folder, suite, domain, chosen.longest)
        }
        ordered = [prompts[i] for i in sorted(prompts, key=lambda i: i.rsplit("-", 1)[1])]
        held_out += ordered[: chosen.held_out]
        train += ordered[chosen.held_out :]
    random.Random(0).shuffle(train)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("heldout", held_out)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (chosen.out / f"{name}.jsonl").write_text(text, "utf-8")
        print(f"{chosen.out / name}.jsonl: {len(rows)} prompts")


def read_suite(folder: Path, suite: str, domain: str, longest: int) -> Iterator[dict[str, Any]]:
    """The prompts of one file, without those over `longest` characters."""
    path = folder / f"{suite}.jsonl"
    if not path.is_file():
        needed = ", ".join(f"{name}.jsonl" for names in DOMAINS.values() for name in names)
        raise SystemExit(f"error: {path}: is missing; give a folder that holds {needed}")
    for line in filter(None, path.read_text("utf-8").split("\n")):
        turns = json.loads(line)["turns"]
        if sum(map(len, turns)) <= longest:
            digest = hashlib.sha256("\n".join(turns).encode()).hexdigest()[:16]
            messages = [{"role": "user", "content": turn} for turn in turns]
            yield {"id": f"{suite}-{digest}", "domain": domain, "messages": messages}


if __name__ == "__main__":
    main()

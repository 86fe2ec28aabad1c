"""Single edits with valid values over all artefacts of a run: each must be found and named, or change
nothing.

    python -m checks.edit_artefacts --work edits --count 200 --seed 0

Makes a small run of the embedded target first (answers, features, a training state, a drafter, a calibration,
a step rate), then changes one thing at a time, as a hand or a disk would: a number by one, a letter, a true
into a false, a bit of a tensor; reads the artefact as the stages do, and puts it back. Prints one line of
JSON; exit code 1 when an edit was neither found nor harmless.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

from checks.forked import finished
from checks.small_run import readers, stages, told
from draftkit.errors import DraftkitError

PROMPTS = 16


def edited(raw: bytes, name: str, chance: random.Random) -> tuple[bytes, str]:
    """The file with one edit, and what was edited."""
    if name.endswith(".safetensors"):
        at = chance.randrange(len(raw))
        return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :], f"a bit of byte {at}"
    numbers = list(re.finditer(rb"(?<=[\[\s:,])-?\d+(?:\.\d+)?(?=[,\s\]}])", raw))
    letters = list(re.finditer(rb"(?<=[a-z])[a-z](?=[a-z ])", raw))
    words = list(re.finditer(rb"\b(?:true|false)\b", raw))
    found = chance.choice(chance.choice([kind for kind in (numbers, letters, words) if kind]))
    old = found[0].decode()
    if old in ("true", "false"):
        new = {"true": "false", "false": "true"}[old]
    elif old.isalpha():
        new = chance.choice("abcdefghijklmnopqrstuvwxyz".replace(old, ""))
    else:
        new = str(int(old) + 1) if old.lstrip("-").isdigit() else repr(float(old) + 0.5)
    around = raw[max(0, found.start() - 30) : found.start()].decode(errors="replace").split("\n")[-1]
    return raw[: found.start()] + new.encode() + raw[found.end() :], f"{around.strip()!r}: {old} -> {new}"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for stage in stages(given.work, PROMPTS):
        code, said = finished(stage.command, given.work / "log")
        if code:
            sys.exit(f"{stage.name}: {said}")
    files, chance = readers(given.work), random.Random(given.seed)
    right = {path: told(read()) for path, read in files.items()}
    outcomes: Counter[str] = Counter()
    unseen: list[str] = []
    for number in range(given.count):
        path = list(files)[number % len(files)]
        raw = path.read_bytes()
        changed, what = edited(raw, path.name, chance)
        path.write_bytes(changed)
        try:
            outcome = "harmless" if told(files[path]()) == right[path] else "unseen"
        except DraftkitError as error:
            outcome = "found and named" if path.name in str(error) else f"found, not named: {error}"
        except Exception as error:
            outcome = f"traceback: {type(error).__name__}"
        path.write_bytes(raw)
        outcomes[outcome] += 1
        if outcome not in ("found and named", "harmless"):
            unseen.append(f"{path.name}: {what}: {outcome}")
    print(
        json.dumps(
            {"edits": given.count, "files": len(files), "outcomes": dict(outcomes), "others": unseen[:20]}
        )
    )
    sys.exit(bool(unseen))


if __name__ == "__main__":
    main()

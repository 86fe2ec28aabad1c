"""Records: what the target wrote, one line of JSON for each conversation, and the manifest that says how they
were made.

A line begins with what resuming needs (`id`, `asked`, `finish_reason`), so that a file of any size is looked
through without reading all of its JSON. `answers` hold the token ids that training learns from. Lines and
manifest hold digests of what they say.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from draftkit.artefact import read_json, sealed, was_changed
from draftkit.data.lines import check_line
from draftkit.data.messages import Conversation
from draftkit.errors import DataError
from draftkit.output import write_text
from draftkit.settings import GenerateSettings
from draftkit.target.prompt_format import PromptFormat

_HEAD = re.compile(
    rb'\{"id": ("(?:[^"\\]|\\.)*"), "asked": "([0-9a-f]{16})", "finish_reason": "(\w+)", .*\}\n', re.DOTALL
)
_MADE_WITH = {  # what a manifest says, and what it means when it differs
    "target": "another target",
    "template": "another chat template",
    "tokenizer": "another tokenizer",
    "switches": "other template switches",
    "stop_token_ids": "other stop tokens",
    "settings": "other settings",
}


def asked_hash(conversation: Conversation) -> str:
    """16 hexadecimal digits of what a conversation asks: its messages without the answers, and its tools."""
    asked = conversation.prompt()
    text = json.dumps([asked.as_dicts(), asked.tools], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Done:
    """What is known of a record that is there already."""

    asked: str
    reason: str


def recover(path: Path, cut: bool = True) -> dict[str, Done]:
    """What is answered already, by id. A last line that is not whole is passed over, and with `cut` cut off:
    a crash tore it. Without the file's lock leave it there, another process may be writing it. Raises
    DataError for a file of something else, or one that holds a record twice."""
    if not path.exists():
        return {}
    done: dict[str, Done] = {}
    twice: Counter[str] = Counter()
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            head = _HEAD.fullmatch(line)
            if head is None:
                raise DataError(f"{path}:{number}: is not a record of answers; remove the file to start anew")
            check_line(line, f"{path}:{number}")
            name = json.loads(head[1])
            if name in done:
                twice[name] += 1
            done[name] = Done(head[2].decode(), sys.intern(head[3].decode()))
            whole += len(line)
    if cut and whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)
    if doubled := [name for name, count in twice.items() if count]:
        raise DataError(
            f"{path}: holds {len(doubled)} answers twice, {doubled[0]!r} first; remove the file to start anew"
        )
    return done


def manifest_path(out: Path) -> Path:
    """Where the manifest of a file of records lies."""
    return out.with_suffix(".manifest.json")


def made_with(
    prompt_format: PromptFormat,
    target_fingerprint: str,
    stop_token_ids: tuple[int, ...],
    settings: GenerateSettings,
) -> dict[str, Any]:
    """Everything that decides what records say; how many are made at a time does not."""
    from draftkit.target.tokenizer import tokenizer_hash  # imports transformers

    chosen = {k: v for k, v in asdict(settings).items() if k != "batch_size"}
    found = {
        "target": target_fingerprint,
        "template": prompt_format.digest,
        "tokenizer": tokenizer_hash(prompt_format.tokenizer),
        "switches": prompt_format.switches,
        "stop_token_ids": stop_token_ids,
        "settings": chosen,
    }
    return dict(json.loads(json.dumps(found)))


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest beside a file of records; None where there is none. Raises DataError when it is
    damaged."""
    path = manifest_path(out)
    if not path.exists():
        return None
    found = read_json(path, DataError, "is damaged, choose another file or remove both")
    if not isinstance(found, dict) or was_changed(found):
        raise DataError(f"{path}: is damaged (it was changed); choose another file or remove both")
    return found


def check_manifest(out: Path, wanted: Mapping[str, Any], today: date | None, begun: bool) -> None:
    """Write the manifest of records that are begun now, or check that of those that go on. Raises DataError
    when they were begun with something else, or by something else."""
    found = read_manifest(out)
    if begun and found is None:
        name = manifest_path(out).name
        raise DataError(
            f"{out}: is there, and no {name} that says what it was made from; choose another file"
        )
    if not begun or found is None:
        said = sealed({**wanted, "today": today and today.isoformat()})
        write_text(manifest_path(out), json.dumps(said, indent=1) + "\n")
        return
    for name, value in wanted.items():
        if found.get(name) != value:
            what = _MADE_WITH[name] if name in found else "another version of draftkit"
            raise DataError(f"{out}: was begun with {what}; choose another file or remove it")


def check_rendered_as(out: Path, prompt_format: PromptFormat) -> None:
    """Raise DataError when a file of records was made with another template, tokenizer or other switches than
    these."""
    from draftkit.target.tokenizer import tokenizer_hash  # imports transformers

    found = read_manifest(out)
    if found is None:
        return
    here = {
        "template": prompt_format.digest,
        "tokenizer": tokenizer_hash(prompt_format.tokenizer),
        "switches": prompt_format.switches,
    }
    for name, value in here.items():
        if name in found and found[name] != value:
            raise DataError(
                f"{out}: was made with {_MADE_WITH[name]} ({found[name]!r:.60}, here {value!r:.60}); give "
                f"the same"
            )

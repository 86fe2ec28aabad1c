"""Lines of a file of records vouch for themselves: whatever letter is edited is found, and the line is
named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from draftkit.data.conversations import SkippedRows, iterate_conversations, read_conversations
from draftkit.data.lines import DIGEST, check_line, json_line, record_line
from draftkit.data.records import recover
from draftkit.errors import DataError

RECORD: dict[str, Any] = {
    "id": "p1",
    "asked": "0123456789abcdef",
    "finish_reason": "stop",
    "domain": "chat",
    "messages": [
        {"role": "user", "content": "Zürich?"},
        {"role": "assistant", "content": 'Ja, "sehr" 日本.'},
    ],
    "answers": [{"prompt_ids": [1, 22, 333], "answer_ids": [4, 5], "finish_reason": "stop"}],
}


def told(path: Path) -> list[Any]:
    return [vars(c) for c in read_conversations([path])]


def test_every_edited_letter_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path, chance = tmp_path / "answers.jsonl", random.Random(0)
    whole = record_line(RECORD).decode()
    path.write_text(whole, "utf-8")
    right, errors = told(path), []
    body = whole.index(DIGEST)
    for at in range(len(whole) - 1):
        other = chance.choice([c for c in 'abcxyz0189 "{' if c != whole[at]])
        path.write_text(whole[:at] + other + whole[at + 1 :], "utf-8")
        try:
            same = told(path) == right
        except DataError as error:
            errors.append(str(error))
            continue
        # of what is said nothing: a space between two fields, the digest's own name
        assert same and (at >= body - 3 or whole[at] == " " or other == " "), whole[:at][-20:]
    assert len(errors) > 0.9 * body and all(f"{path}:1" in error for error in errors)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("333", "334"),
        ('"stop", "domain"', '"length", "domain"'),
        ("sehr", "mehr"),
        ("chat", "code"),
        ("p1", "p2"),
    ],
)
def test_an_edit_is_named_with_its_line_on_reading_and_on_going_on(
    old: str, new: str, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    good, bad = record_line(RECORD | {"id": "p0"}), record_line(RECORD).decode().replace(old, new, 1).encode()
    path.write_bytes(good + bad)
    for read in (lambda: read_conversations([path]), lambda: recover(path)):
        with pytest.raises(DataError, match=rf"{path}:2: was changed after it was written \(id 'p[12]'\)"):
            read()
    skipped = SkippedRows()
    assert [c.id for c in iterate_conversations([path], skipped)] == ["p0"] and skipped.count == 1


def test_what_other_programs_write_differently_is_the_same() -> None:
    row = json.loads(record_line(RECORD))
    for text in (
        json.dumps(row),
        json.dumps(row, separators=(",", ":"), ensure_ascii=False),
        json.dumps(row, indent=None, separators=(" , ", " : ")),
    ):
        check_line(text.encode(), "here:1")
    own = {name: value for name, value in row.items() if name != DIGEST}
    assert own == RECORD
    check_line(json_line(own | {"domain": "edited, and no digest"}), "here:1")
    check_line(b'{"digest": "of another program", "text": "record_digest"}', "here:1")

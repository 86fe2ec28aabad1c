"""Prompts for the small target, and files of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from draftkit.data.messages import Conversation, Message

WORDS = ["list", "value", "holds", "step", "return", "what", "add", "number"]


def prompts(count: int = 14) -> list[Conversation]:
    """So many prompts of one to seven words and a number, in two domains."""
    return [
        Conversation(
            f"p{i}", ["code", "chat"][i % 2], (Message("user", " ".join(WORDS[: 1 + i % 7]) + f" {i}"),)
        )
        for i in range(count)
    ]


def records(path: Path) -> dict[str, Any]:
    """Records by id."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len({r["id"] for r in rows}) == len(rows), "a record is there twice"
    return {r["id"]: r for r in rows}

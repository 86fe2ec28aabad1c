"""Conversations as users have them, read line by line and normalised once.

Three forms of JSONL are read: OpenAI messages (`{"messages": [{"role", "content"}]}`), ShareGPT (`{"conversations":
[{"from", "value"}]}`) and prompts (`{"turns": ["...", ...]}`, the user's side only). `id` and `domain` are optional.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftkit.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A conversation that begins with the user or a system message. `id` is unique within what was read together."""

    id: str
    domain: str
    messages: tuple[Message, ...]

    def as_dicts(self) -> list[dict[str, str]]:
        """OpenAI form, as chat templates expect it."""
        return [{"role": m.role, "content": m.content} for m in self.messages]

    def first_turn(self) -> Conversation:
        """Up to the first message of the user."""
        first = next(i for i, m in enumerate(self.messages) if m.role == "user")
        return Conversation(self.id, self.domain, self.messages[: first + 1])

    def prompt(self) -> Conversation:
        """The user's side: every assistant turn removed."""
        return Conversation(self.id, self.domain, tuple(m for m in self.messages if m.role != "assistant"))


def read_conversations(paths: Iterable[Path]) -> list[Conversation]:
    """Read and check JSONL files. Raises DataError that names the file, the line and what is wrong with it."""
    found: dict[str, Conversation] = {}
    for path in paths:
        count = len(found)
        for number, row in _rows(path):
            where = f"{path}:{number}"
            conversation = _normalise(row, where, path.stem)
            if conversation.id in found:
                raise DataError(f"{where}: id {conversation.id!r} was there before; ids must be unique")
            found[conversation.id] = conversation
        if len(found) == count:
            raise DataError(f"{path}: holds no conversation; write one JSON object per line")
    return list(found.values())


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a JSONL file of conversations")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: is not UTF-8 (byte {error.start}); convert the file") from error
            if not text.strip():
                continue
            try:
                yield number, json.loads(text)
            except json.JSONDecodeError as error:
                hint = "the line is cut off" if not text.endswith("\n") else "one JSON object per line is needed"
                raise DataError(f"{path}:{number}: is not JSON ({error.msg} at column {error.colno}); {hint}") from error
            except ValueError as error:  # Python reads no whole number of more than 4,300 digits
                raise DataError(f"{path}:{number}: holds a number that is too long for a conversation; remove it") from error
            except RecursionError as error:
                raise DataError(f"{path}:{number}: is nested too deeply for a conversation") from error


def _normalise(row: Any, where: str, stem: str) -> Conversation:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is a {type(row).__name__}, must be a JSON object")
    if "messages" in row:
        messages = [_message(m, "role", "content", f"{where}: messages[{i}]") for i, m in _items(row, "messages", where)]
    elif "conversations" in row:
        messages = [
            _message(m, "from", "value", f"{where}: conversations[{i}]") for i, m in _items(row, "conversations", where)
        ]
    elif "turns" in row:
        messages = [_message({"r": "user", "c": t}, "r", "c", f"{where}: turns[{i}]") for i, t in _items(row, "turns", where)]
    else:
        raise DataError(f"{where}: needs one of the keys messages, conversations or turns")
    if not any(m.role == "user" for m in messages):
        raise DataError(f"{where}: has no user turn")
    roles = [m.role for m in messages if m.role != "system"]
    if roles[0] != "user":
        raise DataError(f"{where}: begins with {roles[0]}, must begin with the user (after system messages)")
    for key in ("id", "domain"):
        if not isinstance(row.get(key, ""), (str, int)):
            raise DataError(f"{where}: {key} is a {type(row[key]).__name__}, must be a string")
    text = json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False)
    _check_characters(f"{row.get('id')}{row.get('domain')}{text}", where)
    identity = str(row.get("id") or f"{stem}-{where.rsplit(':', 1)[1]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")
    return Conversation(identity, str(row.get("domain") or stem), tuple(messages))


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write a lone surrogate, "\ud800"; nothing behind it can
        raise DataError(f"{where}: holds half a character ({error.object[error.start]!a}); remove it") from error


def _items(row: dict[str, Any], key: str, where: str) -> list[tuple[int, Any]]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key} must be a list with at least one turn")
    return list(enumerate(value))


def _message(raw: Any, role_key: str, content_key: str, where: str) -> Message:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: is a {type(raw).__name__}, must be an object")
    role, content = raw.get(role_key), raw.get(content_key)
    role = _SHAREGPT.get(str(role), role) if role_key == "from" else role
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is not known; roles are {', '.join(ROLES)}")
    if not isinstance(content, str) or not content:
        raise DataError(f"{where}: content must be a non-empty string, is {content!r:.40}")
    return Message(role, content)

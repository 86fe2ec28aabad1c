"""Messages and conversations as OpenAI defines them, and the answers that a record keeps token by token."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from draftkit.target.deepseek_v4_messages import FIELDS, asks

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `tool_calls` have OpenAI's form; `weight` 0 marks an answer that is not to
    be learnt. `task`, `response_format` and `prefix` are DeepSeek-V4's (`target/deepseek_v4_messages.py`)."""

    role: str
    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None
    task: str | None = None
    response_format: dict[str, Any] | None = None
    prefix: bool | None = None

    def __repr__(self) -> str:
        """Without DeepSeek-V4's fields where it has none: digests of feature stores are made of this."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = (f"{k}={v!r}" for k, v in said.items() if v is not None or k not in FIELDS)
        return f"Message({', '.join(shown)})"

    @property
    def asks(self) -> bool:
        """Whether what comes next is about this very message: an answer to its task, or what follows its
        prefix."""
        return asks(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form, as prompt formats take it."""
        optional = {
            "reasoning_content": self.reasoning,
            "tool_calls": list(self.tool_calls) or None,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
            "weight": self.weight,
            **{field: getattr(self, field) for field in FIELDS},
        }
        return {"role": self.role, "content": self.content} | {
            k: v for k, v in optional.items() if v is not None
        }


@dataclass(frozen=True)
class WrittenTurn:
    """An answer as the target wrote it: the ids it was shown, the ids it wrote, and why it ended ("stop",
    "length", ...)."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    finish_reason: str = "stop"

    @property
    def cut(self) -> bool:
        """Whether a limit ended it, not the target."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Conversation:
    """A conversation with the tools that its requests offered. `id` is unique within what was read together.

    `turns`, where it is a record of answers, are what training learns from; the messages are then for people.
    `finish_reason` is that of the last answer, `switches` the template switches it was made with; None:
    nothing is said.
    """

    id: str
    domain: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    turns: tuple[WrittenTurn, ...] = ()
    finish_reason: str | None = None
    switches: dict[str, Any] | None = None

    @property
    def cut(self) -> bool:
        """Whether a limit ended the last answer."""
        return self.finish_reason == "length"

    def as_dicts(self) -> list[dict[str, Any]]:
        """OpenAI's form, as prompt formats take it."""
        return [m.as_dict() for m in self.messages]

    def first_turn(self) -> Conversation:
        """Up to the first message of the user."""
        first = next(i for i, m in enumerate(self.messages) if m.role == "user")
        return replace(self, messages=self.messages[: first + 1], turns=())

    def measured(self) -> Conversation:
        """What evaluation asks: the first turn; where a message has DeepSeek-V4's task or prefix, all up to
        that."""
        asking = [i for i, m in enumerate(self.messages) if m.asks]
        return (
            replace(self, messages=self.messages[: asking[-1] + 1], turns=()) if asking else self.first_turn()
        )

    def prompt(self) -> Conversation:
        """What is asked: every assistant turn removed. Where the history must stay, all up to the last turn
        that asks: a user's, a tool's, or an assistant's with a task or a prefix."""
        if not self.keeps_history:
            return replace(self, messages=tuple(m for m in self.messages if m.role != "assistant"), turns=())
        asking = (i for i, m in enumerate(self.messages) if m.role in ("user", "tool") or m.asks)
        return replace(self, messages=self.messages[: max(asking) + 1], turns=())

    @property
    def keeps_history(self) -> bool:
        """Whether the assistant's turns must stay: results of tools answer the very calls before them, a
        title is that of the very answer, and a prefix is gone on with."""
        return any(m.role == "tool" or (m.role == "assistant" and m.asks) for m in self.messages)

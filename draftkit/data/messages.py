"""Messages and conversations as OpenAI defines them, and the answers that a record keeps token by token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `tool_calls` have OpenAI's form; `weight` 0 marks an answer that is not to
    be learnt."""

    role: str
    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form, as prompt formats take it."""
        optional = {
            "reasoning_content": self.reasoning,
            "tool_calls": list(self.tool_calls) or None,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
            "weight": self.weight,
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

    def prompt(self) -> Conversation:
        """What is asked: every assistant turn removed; with tool results in it, up to the last one or the
        last user turn, the calls that they answer kept."""
        if not self.has_tool_results:
            return replace(self, messages=tuple(m for m in self.messages if m.role != "assistant"), turns=())
        last = max(i for i, m in enumerate(self.messages) if m.role in ("user", "tool"))
        return replace(self, messages=self.messages[: last + 1], turns=())

    @property
    def has_tool_results(self) -> bool:
        """Whether results of tools stand in it: they answer the very calls before them, which must stay."""
        return any(m.role == "tool" for m in self.messages)

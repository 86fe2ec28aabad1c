"""Anthropic's Messages API: the answer, whole or as its events."""

from __future__ import annotations

import json
from typing import Any

from draftkit.serve.problem import ApiError, anthropic_error
from draftkit.serve.wire import Event, Kind, PartsWire

_DELTAS: dict[Kind, tuple[str, str]] = {  # the name of a delta, and of its field and the block's
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
}


class AnthropicWire(PartsWire):
    """Blocks (thinking, text, tool_use) of one message."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[Event] = []

    def begin(self) -> list[Event]:
        """The message before it says anything."""
        return [{"type": "message_start", "message": self.answer()}]

    def open(self, kind: Kind, piece: Any) -> list[Event]:
        """An empty block."""
        if kind == "call":
            block = {"type": "tool_use", "id": piece["id"], "name": piece["function"]["name"], "input": {}}
        elif kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self._blocks.append(block)
        return [{"type": "content_block_start", **self._place(), "content_block": dict(block)}]

    def grow(self, kind: Kind, piece: Any) -> list[Event]:
        """More text, or a call's input."""
        block = self._blocks[-1]
        if kind == "call":
            written = piece["function"]["arguments"]
            block["input"] = _object(written)
            return [self._delta("input_json_delta", "partial_json", written)]
        name, field = _DELTAS[kind]
        block[field] += piece
        return [self._delta(name, field, piece)]

    def close(self, kind: Kind) -> list[Event]:
        """The block is complete."""
        return [{"type": "content_block_stop", **self._place()}]

    def finish(self) -> list[Event]:
        """Why the message ended, what it took, and the end."""
        whole = self.answer()
        delta = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
        return [
            {"type": "message_delta", "delta": delta, "usage": whole["usage"]},
            {"type": "message_stop"},
        ]

    def failed(self, error: ApiError) -> list[Event]:
        """Why the message cannot go on."""
        return [anthropic_error(error.status, str(error))]

    def answer(self) -> Event:
        """The message."""
        cached = self.usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        reason = self._reason()
        return {
            "id": self.chat.get("id", "").replace("chatcmpl-", "msg_", 1),
            "type": "message",
            "role": "assistant",
            "model": self.chat.get("model"),
            "content": [dict(block) for block in self._blocks],
            "stop_reason": reason,
            "stop_sequence": self.stop_reason if reason == "stop_sequence" else None,
            "usage": {
                "input_tokens": self.usage.get("prompt_tokens", 0) - cached,
                "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": 0,
                "output_tokens": self.usage.get("completion_tokens", 0),
            },
        }

    def _reason(self) -> str | None:
        if self.finish_reason is None:
            return None
        if self.finish_reason == "length":
            return "max_tokens"
        if any(block["type"] == "tool_use" for block in self._blocks):
            return "tool_use"
        return "stop_sequence" if isinstance(self.stop_reason, str) else "end_turn"

    def _delta(self, name: str, field: str, piece: str) -> Event:
        return {"type": "content_block_delta", **self._place(), "delta": {"type": name, field: piece}}

    def _place(self) -> Event:
        return {"index": len(self._blocks) - 1}


def _object(written: str) -> Any:
    """A call's arguments; what the model wrote wrongly is told as it is, under a name of its own."""
    try:
        found = json.loads(written)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"arguments": written}

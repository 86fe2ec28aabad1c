"""OpenAI's Responses API: the answer, whole or as its events in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from draftkit.serve.problem import ApiError
from draftkit.serve.responses_body import ResponsesBody
from draftkit.serve.wire import Event, Kind, PartsWire, new_id

_PARTS: dict[Kind, Event] = {
    "reasoning": {"type": "reasoning_text", "text": ""},
    "text": {"type": "output_text", "text": "", "annotations": []},
}
_NAMES: dict[Kind, str] = {"reasoning": "response.reasoning_text", "text": "response.output_text"}


class ResponsesWire(PartsWire):
    """Items (reasoning, message, function_call) of one response. `count` gives the tokens of a text: thoughts
    are counted apart in `usage`, piece by piece."""

    def __init__(self, asked: ResponsesBody, count: Callable[[str], int]) -> None:
        super().__init__()
        self._asked, self._count = asked, count
        self._items: list[Event] = []
        self._status = "in_progress"
        self._error: Event | None = None
        self._sent = self._thought = 0

    def begin(self) -> list[Event]:
        """The response as it was asked for, twice."""
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self.answer()) for kind in kinds]

    def open(self, kind: Kind, piece: Any) -> list[Event]:
        """An item, and its part where it has one."""
        item: Event
        if kind == "call":
            called = piece["function"]
            item = {"type": "function_call", "id": new_id("fc"), "call_id": piece["id"]}
            item |= {"name": called["name"], "arguments": ""}
        elif kind == "reasoning":
            item = {"type": "reasoning", "id": new_id("rs"), "summary": [], "content": []}
        else:
            item = {"type": "message", "id": new_id("msg"), "role": "assistant", "content": []}
        item["status"] = "in_progress"
        self._items.append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        found = [self._event("response.output_item.added", item=shown, **self._place())]
        if kind != "call":
            item["content"].append(dict(_PARTS[kind]))
            part = dict(_PARTS[kind])
            found.append(self._event("response.content_part.added", part=part, **self._in_part()))
        return found

    def grow(self, kind: Kind, piece: Any) -> list[Event]:
        """More text, or a call's arguments."""
        item = self._items[-1]
        if kind == "call":
            item["arguments"] = piece["function"]["arguments"]
            name = "response.function_call_arguments.delta"
            return [self._event(name, delta=item["arguments"], item_id=item["id"], **self._place())]
        if kind == "reasoning":
            self._thought += self._count(piece)
        item["content"][0]["text"] += piece
        more: Event = {"logprobs": []} if kind == "text" else {}
        return [self._event(f"{_NAMES[kind]}.delta", delta=piece, **self._in_part(), **more)]

    def close(self, kind: Kind) -> list[Event]:
        """The item again, complete; where the answer was cut, its last one is not."""
        item = self._items[-1]
        item["status"] = "incomplete" if self.finish_reason == "length" else "completed"
        done = self._event
        found = []
        if kind == "call":
            names = {"name": item["name"], "arguments": item["arguments"], "item_id": item["id"]}
            found.append(done("response.function_call_arguments.done", **names, **self._place()))
        else:
            part = item["content"][0]
            more: Event = {"logprobs": []} if kind == "text" else {}
            found.append(done(f"{_NAMES[kind]}.done", text=part["text"], **self._in_part(), **more))
            found.append(done("response.content_part.done", part=dict(part), **self._in_part()))
        return [*found, done("response.output_item.done", item=dict(item), **self._place())]

    def finish(self) -> list[Event]:
        """The whole response."""
        self._status = "incomplete" if self.finish_reason == "length" else "completed"
        return [self._event(f"response.{self._status}", response=self.answer())]

    def failed(self, error: ApiError) -> list[Event]:
        """The response as far as it came, and why no further."""
        self._status, self._error = "failed", {"code": "server_error", "message": str(error)}
        return [self._event("response.failed", response=self.answer())]

    def answer(self) -> Event:
        """The response, with the fields that were asked for."""
        asked = self._asked
        cut = self._status == "incomplete"
        form = (asked.text.format if asked.text else None) or {"type": "text"}
        choice = asked.tool_choice or "auto"
        return {
            "id": self.chat.get("id", "").replace("chatcmpl-", "resp_", 1),
            "object": "response",
            "created_at": self.chat.get("created"),
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.chat.get("model"),
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": form},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools or []],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": self._used() if self._status in ("completed", "incomplete") else None,
        }

    def _used(self) -> Event:
        cached = self.usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": self.usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": self.usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._thought},
            "total_tokens": self.usage["total_tokens"],
        }

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **fields}

    def _place(self) -> Event:
        return {"output_index": len(self._items) - 1}

    def _in_part(self) -> Event:
        return {**self._place(), "item_id": self._items[-1]["id"], "content_index": 0}

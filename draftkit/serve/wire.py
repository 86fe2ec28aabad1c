"""How an answer is written for its client. Every API that makes text runs through the chat or completion
path; what differs is what its bodies look like, and that is all that a wire knows.

`PartsWire` is for APIs that tell an answer as parts (thoughts, text, calls) one after another: OpenAI's
Responses and Anthropic's Messages. It takes the chat's own body or chunks, of one choice, and changes nothing
but their form.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

from pydantic import ValidationError

from draftkit.serve.problem import ApiError, from_validation
from draftkit.serve.protocol import ChatBody
from draftkit.serve.stream import dump, event

Event = dict[str, Any]
Kind = Literal["reasoning", "text", "call"]


class Wire(Protocol):
    """Bodies and chunks of our completions or chat completions in, bytes for the client out. One for each
    request."""

    def whole(self, body: bytes) -> bytes:
        """A complete answer."""
        ...

    def chunk(self, chunk: Event) -> bytes:
        """What one chunk adds to a stream."""
        ...

    def end(self) -> bytes:
        """The end of a stream that is complete."""
        ...

    def cut(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on."""
        ...


class PlainWire:
    """Completions and chat completions, as they are."""

    def whole(self, body: bytes) -> bytes:
        """The body itself."""
        return body

    def chunk(self, chunk: Event) -> bytes:
        """The chunk as an event."""
        return event(chunk)

    def end(self) -> bytes:
        """OpenAI's last word."""
        return b"data: [DONE]\n\n"

    def cut(self, error: ApiError) -> bytes:
        """The error, and the end."""
        return event(error.body()) + self.end()


class PartsWire:
    """A chat's answer as parts. A subclass says how an answer begins and ends, and how a part opens, grows
    and closes; the answer itself collects in it, so that a whole one is a stream whose events nobody
    reads."""

    def __init__(self) -> None:
        self.chat: Event = {}  # the envelope of the first chunk: id, created, model
        self.usage: Event = {}
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.kind: Kind | None = None  # of the part that is open

    def whole(self, body: bytes) -> bytes:
        """A complete answer: the message is one large delta."""
        chat = json.loads(body)
        choices = [{**choice, "delta": choice["message"]} for choice in chat["choices"]]
        self._taken({**chat, "choices": choices})
        self._ended()
        return dump(self.answer())

    def chunk(self, chunk: Event) -> bytes:
        """The events of a chunk, each with its name."""
        return b"".join(map(named, self._taken(chunk)))

    def end(self) -> bytes:
        """The last events."""
        return b"".join(map(named, self._ended()))

    def cut(self, error: ApiError) -> bytes:
        """The events of a failure."""
        return b"".join(map(named, self.failed(error)))

    def _taken(self, chunk: Event) -> list[Event]:
        found: list[Event] = []
        self.usage = chunk.get("usage") or self.usage
        if not self.chat:
            self.chat = {name: chunk[name] for name in ("id", "created", "model")}
            found += self.begin()
        for choice in chunk["choices"]:
            for kind, piece in _pieces(choice["delta"]):
                if kind == "call" or kind != self.kind:
                    found += self._closed()
                    self.kind = kind
                    found += self.open(kind, piece)
                found += self.grow(kind, piece)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.stop_reason = choice.get("stop_reason")
        return found

    def _closed(self) -> list[Event]:
        kind, self.kind = self.kind, None
        return self.close(kind) if kind is not None else []

    def _ended(self) -> list[Event]:
        return self._closed() + self.finish()

    def begin(self) -> list[Event]:
        """Before anything is said."""
        raise NotImplementedError

    def open(self, kind: Kind, piece: Any) -> list[Event]:
        """A part begins; of a call, `piece` is the call in OpenAI's form, else text."""
        raise NotImplementedError

    def grow(self, kind: Kind, piece: Any) -> list[Event]:
        """The open part goes on."""
        raise NotImplementedError

    def close(self, kind: Kind) -> list[Event]:
        """The open part is complete."""
        raise NotImplementedError

    def finish(self) -> list[Event]:
        """The answer is complete."""
        raise NotImplementedError

    def failed(self, error: ApiError) -> list[Event]:
        """The answer cannot go on."""
        raise NotImplementedError

    def answer(self) -> Event:
        """The complete answer."""
        raise NotImplementedError


def _pieces(delta: Mapping[str, Any]) -> Iterator[tuple[Kind, Any]]:
    """What a message, or a delta of one, says, in order."""
    if delta.get("reasoning_content"):
        yield "reasoning", delta["reasoning_content"]
    if delta.get("content"):
        yield "text", delta["content"]
    for call in delta.get("tool_calls") or ():
        yield "call", call


def named(data: Event) -> bytes:
    """A server-sent event that bears its type as its name."""
    return b"event: " + data["type"].encode() + b"\n" + event(data)


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}_{uuid.uuid4().hex}"


def as_chat(fields: Mapping[str, Any], stream: bool) -> ChatBody:
    """A chat completion's body of these fields, those that are None left out; its stream says at every chunk
    what was used. Raises ApiError 400."""
    given = {name: value for name, value in fields.items() if value is not None}
    if stream:
        options = {"include_usage": True, "continuous_usage_stats": True}
        given |= {"stream": True, "stream_options": options}
    try:
        return ChatBody.model_validate(given)
    except ValidationError as error:
        raise from_validation(error) from None

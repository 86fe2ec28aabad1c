"""A DeepSeek-V4 answer taken apart as it comes: reasoning, content and tool calls, by DeepSeek's own parser.

The parser reads text. A special token's name that the model spelled with ordinary tokens is no special token:
it gets a mark before the parser sees it, which is taken out of what the parser gives. The parser ends a
parameter at the first closing tag, also within a string of JSON: an answer whose arguments are no JSON then
is read a second time, with marks in such strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from draftkit.target.answer_parts import AnswerParts
from draftkit.target.answer_stream import AnswerDelta, AnswerStream

_MARK = "\ue000"  # private use
_JSON_VALUE = re.compile(r'<｜DSML｜parameter name="[^"]*" string="false">\s*')
# Where an answer begins, by DeepSeek's names; None: in the content, without thinking before it.
Stage = Literal["ReasoningStart", "ReasoningContinuation", "ContentContinuation"] | None
_ENDS = ("<｜end▁of▁sentence｜>", "<｜User｜>")


class DeepseekAnswer:
    """Takes an answer's tokens in any pieces. Each piece gives OpenAI's deltas; `finish` gives the whole."""

    def __init__(self, recipe: Any, tokenizer: Any, names: Mapping[int, str], stage: Stage) -> None:
        self._recipe, self._tokenizer, self._names, self._stage = recipe, tokenizer, names, stage
        self._processor = _processor(recipe, stage)
        self._text: list[str] = []  # that the parser was given
        self._whole = recipe.ChatCompletionResponse("answer", "model", 0, 0, 0)
        self._spelled = re.compile(
            "|".join(re.escape(n) for n in sorted(names.values(), key=len, reverse=True))
        )
        self._waiting: list[int] = []  # ordinary tokens that may not be whole characters yet, or whole names
        self._ended = False

    def add(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The next tokens; what they complete, as deltas of OpenAI's chunks."""
        found: list[dict[str, Any]] = []
        for token in ids:
            name = self._names.get(token)
            if name is None:
                self._waiting.append(token)
                continue
            found += self._flush(whole=True)
            self._ended |= name in _ENDS
            found += self._push(name)
        return found + self._flush(whole=False)

    def add_text(self, text: str) -> list[dict[str, Any]]:
        """The next piece of the answer's text, where special tokens are among it by their names."""
        return self._push(text) if text else []

    def finish(self) -> AnswerParts:
        """The whole answer, when there are no more tokens; calls numbered from call_0."""
        self.close()
        message = _message(self._whole)
        if any(not _is_object(call) for call in message.get("tool_calls") or ()):
            message = self._read_again() or message
        calls = tuple(
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {name: _unmarked(call["function"][name]) for name in ("name", "arguments")},
            }
            for number, call in enumerate(message.get("tool_calls") or ())
        )
        return AnswerParts(
            _unmarked(message.get("content") or ""),
            _unmarked(message.get("reasoning_content")) or None,
            calls,
        )

    def close(self) -> list[dict[str, Any]]:
        """The last deltas, when there are no more tokens."""
        found = self._flush(whole=True)
        if self._processor.finished:
            return found
        stop = self._recipe.InferenceChunk.finish(self._recipe.InferenceFinishReason.Stop)
        return found + self._taken(self._processor.push(stop)) + self._taken(self._processor.finish())

    def _flush(self, whole: bool) -> list[dict[str, Any]]:
        """Push what waits: all of it, or what can no longer become another character or a spelled name."""
        text = self._tokenizer.decode(self._waiting, skip_special_tokens=False) if self._waiting else ""
        if not whole and (text.endswith("\ufffd") or self._begins_name(text)):
            return []
        self._waiting = []
        marked = self._spelled.sub(lambda m: m[0][0] + _MARK + m[0][1:], text)
        return self._push(marked) if marked else []

    def _begins_name(self, text: str) -> bool:
        tail = text[-32:]
        starts = (tail[i:] for i in range(len(tail)))
        return any(name.startswith(start) for start in starts for name in self._names.values())

    def _push(self, text: str) -> list[dict[str, Any]]:
        if self._ended:
            return []
        self._text.append(text)
        return self._taken(self._processor.push(self._recipe.InferenceChunk.text(text, 1)))

    def _read_again(self) -> dict[str, Any] | None:
        """The answer with strings of JSON left whole; None where its arguments are no JSON all the same."""
        text = self._recipe.InferenceChunk.text(_with_whole_strings("".join(self._text)), 1)
        stop = self._recipe.InferenceChunk.finish(self._recipe.InferenceFinishReason.Stop)
        processor = _processor(self._recipe, self._stage)
        whole = self._recipe.ChatCompletionResponse("answer", "model", 0, 0, 0)
        for chunk in (*processor.push(text), *processor.push(stop), *processor.finish()):
            whole.accumulate(chunk)
        message = _message(whole)
        return message if all(map(_is_object, message.get("tool_calls") or ())) else None

    def _taken(self, chunks: Sequence[Any]) -> list[dict[str, Any]]:
        deltas = [json.loads(chunk.to_json())["choices"][0]["delta"] for chunk in chunks]
        for chunk in chunks:
            self._whole.accumulate(chunk)
        return [_clean(delta) for delta in deltas]


class DeepseekReader(AnswerStream):
    """The same as `AnswerStream`, by DeepSeek's parser; tool calls are whole, so they come at the end."""

    def __init__(self, answer: DeepseekAnswer) -> None:
        self._answer = answer

    def add(self, piece: str) -> AnswerDelta:
        """What is certain after this piece."""
        return _summed(self._answer.add_text(piece))

    def finish(self) -> AnswerDelta:
        """What is left when the answer ends, and its calls."""
        return _summed(self._answer.close()) + AnswerDelta(tool_calls=self._answer.finish().tool_calls)


def _processor(recipe: Any, stage: Stage) -> Any:
    request = recipe.ConversationRequest(
        recipe.Conversation([recipe.UserMessage("")]), recipe.ModelVersion.DeepseekV4Pro
    )
    begins = getattr(recipe.ThinkingInitialStage, stage) if stage else None
    return recipe.StreamProcessor(
        recipe.ChatCompletionRequest.chunk_generator(request, "answer", "model"),
        recipe.ParsingOptions(thinking_initial_stage=begins),
    )


def _message(whole: Any) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(whole.to_json())["choices"][0]["message"]
    return message


def _is_object(call: Mapping[str, Any]) -> bool:
    """Whether a call's arguments are a JSON object."""
    try:
        return isinstance(json.loads(call["function"]["arguments"]), dict)
    except (ValueError, RecursionError):
        return False


def _with_whole_strings(text: str) -> str:
    """The text with a mark after each < of a parameter in JSON that is whole: it stands in a string."""
    parts, at = list[str](), 0
    for opening in _JSON_VALUE.finditer(text):
        if opening.start() < at:  # within the value before
            continue
        try:
            end = json.JSONDecoder().raw_decode(text, opening.end())[1]
        except (ValueError, RecursionError):
            continue
        parts += [text[at : opening.end()], text[opening.end() : end].replace("<", "<" + _MARK)]
        at = end
    return "".join([*parts, text[at:]])


def _summed(deltas: Sequence[dict[str, Any]]) -> AnswerDelta:
    """Reasoning and content of some deltas."""
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    return AnswerDelta(reasoning, "".join(delta.get("content", "") for delta in deltas))


def _clean(delta: Any) -> Any:
    """A delta without marks, at any depth."""
    if isinstance(delta, dict):
        return {name: _clean(value) for name, value in delta.items() if value is not None}
    if isinstance(delta, list):
        return [_clean(value) for value in delta]
    return _unmarked(delta) if isinstance(delta, str) else delta


def _unmarked(text: str | None) -> str:
    return (text or "").replace(_MARK, "")

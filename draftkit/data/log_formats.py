"""Logs of agents and servers as they lie on disk, read into rows of OpenAI messages.

Each format is a reader: from a file's JSON objects (or its lines) to rows with `messages`, `tools` and `id`.
`FORMATS` names them; `recognise` finds the one that a file has.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from draftkit.data.lines import json_value

Row = dict[str, Any]


def bodies(objects: Iterable[Row]) -> Iterator[Row]:
    """Requests and responses of OpenAI's chat API, one pair for each line (`request` and `response`, or
    LiteLLM's `messages` and `response`), and rows that are conversations already."""
    for one in objects:
        request = _body(one.get("request") or one.get("request_body") or one.get("kwargs") or one)
        response = _body(one.get("response") or one.get("response_body") or one.get("response_obj"))
        messages = request.get("messages")
        if not isinstance(messages, list):
            yield one  # another form of a conversation, or nothing: said where rows are read
            continue
        if request.get("continue_final_message") and _body((messages or [0])[-1]).get("role") == "assistant":
            messages = [*messages[:-1], _body(messages[-1]) | {"prefix": True}]
        tools = request.get("tools") or _body(
            request.get("optional_params") or request.get("model_parameters")
        ).get("tools")
        answers, reason = _answer(response)
        row = {"messages": [*messages, *answers], "tools": tools, "finish_reason": reason}
        yield row | {"domain": one.get("domain")}


def _answer(response: Row) -> tuple[list[Row], Any]:
    """The assistant's message of a response and why it ended; none of an error or of a stream that was not
    joined."""
    choices = _listed(response.get("choices"))
    choice = _body(choices[0]) if choices else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        return [], None
    return [{**message, "role": "assistant"}], choice.get("finish_reason")


def _body(value: Any) -> Row:
    """An object, also where a log keeps it as text."""
    if isinstance(value, str):
        try:
            value = json_value(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


_QUOTED = r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"  # a text as Python's repr has it
_VLLM = re.compile(rf"(?:Received request|Request) (\S+?)(?: details)?: prompt: {_QUOTED}")
_VLLM_ANSWER = re.compile(
    rf"Generated response (\S+?)(?: \(streaming complete\))?: output: {_QUOTED},.*finish_reason: (\w+)"
)
_CHAT_MARKS = (
    re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL),
    re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", re.DOTALL),
    re.compile(r"<start_of_turn>(\w+)\n(.*?)<end_of_turn>", re.DOTALL),
)


def vllm_lines(lines: Iterable[str]) -> Iterator[Row]:
    """vLLM's own log with `--enable-log-requests` (its prompts stand there at VLLM_LOGGING_LEVEL=DEBUG):
    rendered prompts, taken apart where their marks are ChatML's, Llama 3's or Gemma's, with the answers where
    `--enable-log-outputs` gave them."""
    asked: dict[str, Row] = {}
    for line in lines:
        if found := _VLLM.search(line):
            text = ast.literal_eval(found[2])
            turns = next((t for marks in _CHAT_MARKS if (t := marks.findall(text))), [])
            roles = {"model": "assistant", "ipython": "tool"}
            messages = [{"role": roles.get(r, r), "content": c.strip()} for r, c in turns]
            row: Row = {"id": found[1], "messages": messages or text}
            if (earlier := asked.pop(found[1], None)) is not None:
                yield earlier
            asked[found[1]] = row
        elif (found := _VLLM_ANSWER.search(line)) and not found[2][1:].startswith("[tool_calls: "):
            name = next((n for n in (found[1], f"{found[1]}-0") if n in asked), "")
            row = asked.pop(name, {})
            if isinstance(row.get("messages"), list):
                row["messages"].append({"role": "assistant", "content": ast.literal_eval(found[2])})
                row["finish_reason"] = found[3]
            if row:
                yield row
    yield from asked.values()


def otel_spans(objects: Iterable[Row]) -> Iterator[Row]:
    """OpenTelemetry spans with GenAI attributes, as OTLP's JSON or one span for each line."""
    for one in objects:
        scopes = [s for r in one.get("resourceSpans", []) for s in r.get("scopeSpans", [])]
        for span in [s for scope in scopes for s in scope.get("spans", [])] or [one]:
            about = _attributes(span.get("attributes"))
            given = _listed(about.get("gen_ai.input.messages"))
            if not given:
                continue
            said = _listed(about.get("gen_ai.output.messages"))
            system = "\n".join(
                str(p.get("content", "")) for p in _listed(about.get("gen_ai.system_instructions"))
            )
            messages = [{"role": "system", "content": system}] if system else []
            messages += [m for raw in [*given, *said] for m in _from_parts(raw)]
            reason = said[-1].get("finish_reason") if said else None
            tools = _listed(about.get("gen_ai.tool.definitions"))
            yield {"messages": messages, "tools": tools, "finish_reason": reason}


def _attributes(given: Any) -> Row:
    if isinstance(given, list):  # OTLP: [{"key": ..., "value": {"stringValue": ...}}]
        return {
            a["key"]: next(iter(a["value"].values()), None) for a in given if isinstance(a.get("value"), dict)
        }
    return given if isinstance(given, dict) else {}


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json_value(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def _from_parts(raw: Row) -> Iterator[Row]:
    """A GenAI message (role, parts) as OpenAI's: results of tools are messages of their own."""
    said: Row = {"role": raw.get("role"), "content": None}
    for part in raw.get("parts", []):
        kind, content = part.get("type"), part.get("content")
        if kind == "tool_call_response":
            result = part.get("response", part.get("result", ""))
            yield {"role": "tool", "tool_call_id": part.get("id"), "content": _as_text(result)}
        elif kind == "tool_call":
            said.setdefault("tool_calls", []).append(
                _call(part.get("id"), part.get("name"), part.get("arguments"))
            )
        elif kind == "reasoning":
            said["reasoning_content"] = content
        else:
            said["content"] = f"{said['content']}\n{content}" if said["content"] else content
    if said["content"] or "tool_calls" in said or "reasoning_content" in said:
        yield said


def claude_code(objects: Iterable[Row]) -> Iterator[Row]:
    """Session files of Claude Code (~/.claude/projects/*/*.jsonl): lines of type user and assistant, by
    session."""
    sessions: dict[str, list[Row]] = {}
    open_ids: dict[str, Any] = {}
    cut: dict[str, Row] = {}  # the last answer that a limit ended
    for one in objects:
        message = one.get("message")
        if one.get("type") not in ("user", "assistant") or not isinstance(message, dict) or one.get("isMeta"):
            continue
        session = f"{one.get('sessionId', 'session')}{'-side' if one.get('isSidechain') else ''}"
        told = sessions.setdefault(session, [])
        for said in _from_blocks(message):
            same = (
                said["role"] == "assistant" and message.get("id") and open_ids.get(session) == message["id"]
            )
            if same:  # one answer, written block by block
                _join(told[-1], said)
            else:
                told.append(said)
            if message.get("stop_reason") == "max_tokens":
                cut[session] = told[-1]
                told[-1]["weight"] = 0
        open_ids[session] = message.get("id") if message.get("role") == "assistant" else None
    for name, told in sessions.items():
        if told and cut.get(name) is told[-1]:
            del told[-1]["weight"]
            yield {"id": name, "messages": told, "finish_reason": "length"}
        else:
            yield {"id": name, "messages": told}


def _from_blocks(message: Row) -> Iterator[Row]:
    """Content blocks (text, thinking, tool_use, tool_result) as OpenAI's messages."""
    content = message.get("content")
    if isinstance(content, str):
        yield {"role": message.get("role"), "content": content}
        return
    said: Row = {"role": message.get("role"), "content": None}
    for block in content or []:
        kind = block.get("type")
        if kind == "tool_result":
            yield {
                "role": "tool",
                "tool_call_id": block.get("tool_use_id"),
                "content": _as_text(block.get("content")),
            }
        elif kind == "tool_use":
            said.setdefault("tool_calls", []).append(
                _call(block.get("id"), block.get("name"), block.get("input"))
            )
        elif kind == "thinking":
            said["reasoning_content"] = block.get("thinking")
        elif kind == "text":
            said["content"] = f"{said['content']}\n{block['text']}" if said["content"] else block["text"]
    if said["content"] or "tool_calls" in said or said.get("reasoning_content"):
        yield said


def _join(first: Row, more: Row) -> None:
    for name in ("content", "reasoning_content"):
        parts = [p for p in (first.get(name), more.get(name)) if p]
        if parts:
            first[name] = "\n".join(parts)
    if "tool_calls" in more:
        first["tool_calls"] = [*first.get("tool_calls", []), *more["tool_calls"]]


def codex(objects: Iterable[Row]) -> Iterator[Row]:
    """Session files of Codex (~/.codex/sessions/**/rollout-*.jsonl): response items, one session for each
    file."""
    name, told, thought = None, [], None
    for one in objects:
        item = one.get("payload") if one.get("type") in ("response_item", "session_meta") else one
        if not isinstance(item, dict):
            continue
        if one.get("type") == "session_meta":
            name = item.get("id")
        elif item.get("type") == "message":
            text = "\n".join(p.get("text", "") for p in item.get("content", []) if isinstance(p, dict))
            told.append({"role": item.get("role"), "content": text} | _thought(item, thought))
            thought = None
        elif item.get("type") == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            thought = "\n".join(p.get("text", "") for p in parts) or thought
        elif item.get("type") == "function_call":
            call = _call(item.get("call_id"), item.get("name"), item.get("arguments"))
            told.append(
                {"role": "assistant", "content": None, "tool_calls": [call]}
                | _thought({"role": "assistant"}, thought)
            )
            thought = None
        elif item.get("type") == "function_call_output":
            told.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": _as_text(item.get("output"))}
            )
    if told:
        yield {"id": name, "messages": told}


def _thought(item: Row, thought: str | None) -> Row:
    return {"reasoning_content": thought} if thought and item.get("role") == "assistant" else {}


def _call(identity: Any, name: Any, arguments: Any) -> Row:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments or {}}}


def _as_text(value: Any) -> str:
    """A tool's result as text; text parts are joined."""
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        return "\n".join(p["text"] for p in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


FORMATS: dict[str, tuple[str, Callable[[Any], Iterator[Row]]]] = {
    "bodies": ("requests and responses of the chat API (also LiteLLM's), or conversations", bodies),
    "vllm": ("vLLM's log with --enable-log-requests, and --enable-log-outputs", vllm_lines),
    "otel": ("OpenTelemetry GenAI spans", otel_spans),
    "claude-code": ("session files of Claude Code", claude_code),
    "codex": ("session files of Codex", codex),
}


def recognise(first: list[str]) -> str | None:
    """The format of a file by its first lines; None when it is none of FORMATS."""
    if any(_VLLM.search(line) for line in first):
        return "vllm"
    objects = [o for line in first if isinstance(o := _parsed(line), dict)]
    if any(
        "resourceSpans" in o or any(k.startswith("gen_ai.") for k in _attributes(o.get("attributes")))
        for o in objects
    ):
        return "otel"
    if any("sessionId" in o and "message" in o for o in objects):
        return "claude-code"
    if any(o.get("type") in ("session_meta", "response_item") for o in objects):
        return "codex"
    known = {"messages", "request", "request_body", "kwargs", "conversations", "turns", "prompt"}
    return "bodies" if any(known & o.keys() for o in objects) else None


def _parsed(line: str) -> Any:
    try:
        return json_value(line)
    except ValueError:
        return None

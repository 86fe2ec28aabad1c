"""Grammars as llguidance reads them, made of what a request says an answer must look like. No torch, no
engine: a process of its own does this (see grammar_check.py), because what a client wrote may crash whoever
reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from draftkit.serve.formats import ForcedCalls, Form, ResponseFormat

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Between the parts of JSON: a space or nothing. Without a bound small models never stop.
_SPACES: Any = {"whitespace_pattern": " ?"}
# that llguidance knows
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
_VALUES = frozenset({"const", "enum", "default", "examples"})  # keywords whose values are no schemas


@dataclass(frozen=True)
class GrammarSource:
    """What the client gave: a JSON schema (an object, or text that holds one), a regular expression, a list
    of texts, a grammar in Lark or GBNF, or functions with whether several may be called."""

    kind: Literal["schema", "regex", "choice", "grammar", "calls"]
    value: Any

    def dump(self) -> str:
        """As JSON on one line; two sources that mean the same have the same. Raises RecursionError,
        ValueError."""
        return json.dumps(asdict(self), ensure_ascii=True, sort_keys=False)


def source_of(wanted: Form) -> GrammarSource:
    """The source of a form that binds."""
    if isinstance(wanted, ForcedCalls):
        return GrammarSource("calls", [list(wanted.functions), wanted.many])
    if isinstance(wanted, ResponseFormat):
        given = wanted.json_schema if wanted.type == "json_schema" else None
        return GrammarSource("schema", {"type": "object"} if given is None else given.schema_)
    if wanted.regex is not None:
        return GrammarSource("regex", wanted.regex)
    if wanted.choice is not None:
        return GrammarSource("choice", wanted.choice)
    if wanted.grammar is not None:
        return GrammarSource("grammar", wanted.grammar)
    return GrammarSource("schema", {"type": "object"} if wanted.json_ is None else wanted.json_)


def grammar_of(source: GrammarSource) -> str:
    """The grammar, which may still turn out not to compile. Raises what json's and llguidance's readers
    do."""
    value = source.value
    if source.kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if source.kind == "choice":
        return _choice(value)
    if source.kind == "grammar":
        return LLMatcher.grammar_from_lark(any_to_lark(value))
    if source.kind == "calls":
        return _calls(*value)
    schema = json.loads(value) if isinstance(value, str) else value
    return LLMatcher.grammar_from_json_schema(_known_formats(schema), _SPACES)


def _known_formats(schema: Any) -> Any:
    """The schema without formats that llguidance does not know: JSON Schema calls `format` an annotation, and
    a "path" or a "binary" is any text."""
    if isinstance(schema, list):
        return [_known_formats(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: v for k, v in schema.items() if k != "format" or not isinstance(v, str) or v in _FORMATS}
    return {k: v if k in _VALUES else _known_formats(v) for k, v in kept.items()}


def _choice(texts: list[str]) -> str:
    """One of these texts: each as a regular expression of itself, since texts in Lark cannot hold every
    character."""
    return LLMatcher.grammar_from_regex("|".join(f"(?:{_escaped(text)})" for text in texts))


def _escaped(text: str) -> str:
    """The regular expression of a text."""
    return "".join(f"\\x{{{ord(c):x}}}" if not c.isalnum() else c for c in text)


def _calls(functions: list[dict[str, Any]], many: bool) -> str:
    """Tool calls as chat templates write them (Hermes, Qwen). Each function's parameters are a schema by
    themselves, whose references begin at its own root; a function without parameters takes none."""
    rules = [f'call: /{_escaped(OPEN)}/ "\\n" one "\\n" /{_escaped(CLOSE)}/']
    rules.insert(0, 'start: call ("\\n" call)*' if many else "start: call")
    rules.append("one: " + " | ".join(f"function{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        schema = function.get("parameters") or {
            "type": "object",
            "properties": {},
            "additionalProperties": False,
        }
        rules.append(f'function{i}: /{_escaped(head)}/ arguments{i} "}}"')
        rules.append(f"arguments{i}: %json {json.dumps({**_known_formats(schema), 'x-guidance': _SPACES})}")
    return LLMatcher.grammar_from_lark("\n".join(rules))

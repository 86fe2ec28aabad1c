"""Grammars as llguidance reads them, made of what a request says an answer must look like. No torch, no
engine: a process of its own does this (see grammar_check.py), because what a client wrote may crash whoever
reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from draftkit.serve.call_grammar import dsml_calls, json_calls
from draftkit.serve.formats import ForcedCalls, Form, ResponseFormat
from draftkit.serve.lark_parts import SPACES, escaped, known_formats


@dataclass(frozen=True)
class GrammarSource:
    """What the client gave: a JSON schema (an object, or text that holds one), a regular expression, a list
    of texts, a grammar in Lark or GBNF, or the form of calls (`CallForm`), the functions, and whether several
    may be called."""

    kind: Literal["schema", "regex", "choice", "grammar", "calls"]
    value: Any

    def dump(self) -> str:
        """As JSON on one line; two sources that mean the same have the same. Raises RecursionError,
        ValueError."""
        return json.dumps(asdict(self), ensure_ascii=True, sort_keys=False)


def source_of(wanted: Form, calls: str | None) -> GrammarSource:
    """The source of a form that binds; `calls` is the target's form of calls."""
    if isinstance(wanted, ForcedCalls):
        return GrammarSource("calls", [calls, list(wanted.functions), wanted.many])
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
        form, functions, many = value
        calls = (dsml_calls if form == "dsml" else json_calls)(functions, many)
        return LLMatcher.grammar_from_lark(calls)
    schema = json.loads(value) if isinstance(value, str) else value
    return LLMatcher.grammar_from_json_schema(known_formats(schema), SPACES)


def _choice(texts: list[str]) -> str:
    """One of these texts."""
    return LLMatcher.grammar_from_regex("|".join(f"(?:{escaped(text)})" for text in texts))

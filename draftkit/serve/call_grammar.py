"""Grammars of tool calls that are demanded, in the forms that targets were taught. Functions are OpenAI's:
`name`, and the JSON schema `parameters`; one without parameters takes none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from draftkit.serve.lark_parts import escaped, json_by, known_formats

OPEN, CLOSE = "<tool_call>", "</tool_call>"
DSML = "｜DSML｜"
_VALUE_END = f"</{DSML}parameter>"
# of a function's schema; what else stands there cannot be told of one parameter at a time
_OF_OBJECTS = frozenset(
    "type properties required additionalProperties patternProperties description title default examples "
    "$defs definitions $schema $id $comment strict".split()
)
_ANYTHING: dict[str, Any] = {}
# of a parameter that is written as it is; all others are written as JSON
_OF_TEXT = frozenset("type description title default examples enum const minLength maxLength".split())


def json_calls(functions: list[dict[str, Any]], many: bool) -> str:
    """Calls as Hermes and Qwen write them, JSON in <tool_call>. Each function's parameters are a schema by
    themselves, whose references begin at its own root."""
    rules = [f'call: /{escaped(OPEN)}/ "\\n" one "\\n" /{escaped(CLOSE)}/']
    rules.insert(0, 'start: call ("\\n" call)*' if many else "start: call")
    rules.append("one: " + " | ".join(f"function{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        rules.append(f'function{i}: /{escaped(head)}/ arguments{i} "}}"')
        rules.append(f"arguments{i}: {json_by(function.get('parameters') or nothing)}")
    return "\n".join(rules)


def dsml_calls(functions: list[dict[str, Any]], many: bool) -> str:
    """Calls as DeepSeek-V4 writes them. Parameters stand in the order of the schema, those that are not
    required or not. Raises ValueError for what cannot be written or enforced."""
    begin, end = escaped(f"\n\n<{DSML}tool_calls>\n"), escaped(f"</{DSML}tool_calls>")
    rules = [f"start: /{begin}/ call{'+' if many else ''} /{end}/"]
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        rules += _dsml_call(f"call{i}", function)
    return "\n".join(rules)


def _dsml_call(rule: str, function: dict[str, Any]) -> Iterator[str]:
    schema, name = function.get("parameters") or {}, _attribute(function["name"])
    if unknown := sorted(schema.keys() - _OF_OBJECTS):
        raise ValueError(f"{unknown[0]} beside the parameters of {name} cannot be enforced")
    if schema.get("type", "object") != "object":
        raise ValueError(f"the parameters of {name} are no object")
    properties, required = dict(schema.get("properties") or {}), schema.get("required") or ()
    properties |= {key: True for key in required if key not in properties}
    given = {
        key: _ANYTHING if value is True else value for key, value in properties.items() if value is not False
    }
    if lost := sorted(set(required) - given.keys()):
        raise ValueError(f"{lost[0]} of {name} is required and can have no value")
    parts = [f"{rule}p{n}{'' if key in required else '?'}" for n, key in enumerate(given)]
    begin, end = f'<{DSML}invoke name="{name}">\n', f"</{DSML}invoke>\n"
    yield f"{rule}: /{escaped(begin)}/ {' '.join(parts)} /{escaped(end)}/"
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for n, (key, value) in enumerate(given.items()):
        yield from _dsml_parameter(f"{rule}p{n}", _attribute(key), value, shared)


def _dsml_parameter(rule: str, name: str, schema: dict[str, Any], shared: dict[str, Any]) -> Iterator[str]:
    """Text as it is, everything else as JSON, which `string` tells."""
    own = known_formats(_looked_up(schema, shared))
    text, end = _text(own), escaped(_VALUE_END)
    head = escaped(f'<{DSML}parameter name="{name}" string="{"false" if text is None else "true"}">')
    if text is None:
        yield f'{rule}: /{head}/ {rule}j /{end}/ "\\n"'
        yield f"{rule}j: {json_by({**shared, **own})}"
        return
    # text and its end are one token of the grammar; nothing that begins as the end does stands in the text
    yield f'{rule}: /{head}/ {rule.upper()} "\\n"'
    yield f"{rule.upper()}: /(?s:{text}){end}/ & ~/(?s:.*<\\/?｜.*){end}/"


def _text(schema: dict[str, Any]) -> str | None:
    """The regular expression of a parameter that is text; None for other types, and for what a JSON schema
    can demand of a text beyond its length."""
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    bounds = [schema[name] for name in ("minLength", "maxLength") if name in schema]
    if choices == [] or not all(type(bound) is int and bound >= 0 for bound in bounds):
        return None  # as JSON, where the compiler of schemas says what it cannot read
    if schema.keys() - _OF_TEXT or schema.get("type", "string" if choices else None) != "string":
        return None
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if choices is not None:
        fit = all(isinstance(c, str) and "<" not in c for c in choices) and (least, most) == (0, None)
        return "|".join(map(escaped, choices)) if fit else None
    return f".{{{least},{'' if most is None else most}}}" if least or most is not None else ".*"


def _looked_up(schema: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """What a reference alone refers to."""
    reference = schema.get("$ref") if len(schema) == 1 else None
    where, _, name = (
        reference.removeprefix("#/").partition("/") if isinstance(reference, str) else ("", "", "")
    )
    found = (shared.get(where) or {}).get(name, schema)
    return found if isinstance(found, dict) else schema


def _attribute(name: str) -> str:
    if set(name) & set('"<>\n\r'):
        raise ValueError(f"the name {name!r} cannot be written in DeepSeek's form of calls; rename it")
    return name

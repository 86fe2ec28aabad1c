"""Request bodies drawn from the server's own OpenAPI description, right, nearly right and wrong
(hypothesis)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]
MAKES_TEXT = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 255, 256, 257, 4095, 4096, 0.5, 1e308, -0.0, 5e-324, 2**31, 2**63 - 1, 2**63]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(
        ["", "\x00", "<|im_start|>", "<tool_call>", "\U0010ffff", "auto", "json_object", "user", "$ref"]
    ),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# What a schema cannot say: ids of the vocabulary (and just beyond), names that exist, JSON schemas, keys that
# are numbers.
ids = st.lists(st.integers(0, 4100), min_size=1, max_size=4)
json_schemas = st.sampled_from(
    [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "array", "items": {"enum": ["x", 1, None]}, "maxItems": 3},
        {"type": "string", "pattern": "[ab]{2}"},
        {"$ref": "#"},
        {"$ref": "#/nowhere"},
        {"type": "object", "patternProperties": {"(": {}}},
        {"anyOf": [], "type": "number"},
        {},
    ]
)
text_parts = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)})
functions = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"])}, optional={"parameters": json_schemas}
)
KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("tiny"),
    "stop_token_ids": ids,
    "allowed_token_ids": ids,
    "tokens": ids,
    "logit_bias": st.dictionaries(st.integers(0, 4100).map(str), st.floats(-100, 100), max_size=3),
    "role": st.sampled_from(["user", "assistant", "system", "tool", "x"]),
    "content": st.text(max_size=12) | st.lists(text_parts, max_size=2),
    "schema": json_schemas | anything,
    "tools": st.lists(
        st.fixed_dictionaries({"type": st.just("function"), "function": anything | functions}),
        min_size=1,
        max_size=2,
    ),
    "prompt": st.text(max_size=20)
    | ids
    | st.lists(st.text(max_size=5), min_size=1, max_size=3)
    | st.lists(ids, max_size=2),
    "chat_template_kwargs": st.just({"enable_thinking": False})
    | st.dictionaries(st.text(max_size=12), anything, max_size=2),
}


def values_of(schema: Schema, definitions: Schema) -> st.SearchStrategy[Any]:
    """Values that a schema allows."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return st.deferred(lambda: values_of(definitions[name], definitions))
    if "anyOf" in schema:
        return st.one_of([values_of(option, definitions) for option in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object":
        return _objects(schema, definitions)
    if kind == "array":
        most = min(schema.get("maxItems", 3), 40)
        return st.lists(
            values_of(schema.get("items", {}), definitions), min_size=schema.get("minItems", 0), max_size=most
        )
    if kind == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 12), 12))
    if kind in ("integer", "number"):
        return _numbers(schema, kind == "integer")
    return {"boolean": st.booleans(), "null": st.none()}.get(str(kind), anything)


def _numbers(schema: Schema, whole: bool) -> st.SearchStrategy[Any]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -(2**63)))
    high = schema.get("maximum", schema.get("exclusiveMaximum", 2**63 - 1))
    edges = st.sampled_from([low, high])
    if whole:
        return st.integers(low, high) | st.integers(max(low, -2), min(high, 20)) | edges
    return (
        st.floats(float(low), float(high)) | st.floats(max(float(low), -1.0), min(float(high), 2.0)) | edges
    )


def _objects(schema: Schema, definitions: Schema) -> st.SearchStrategy[dict[str, Any]]:
    """The required fields and up to four others."""
    fields, required = schema.get("properties", {}), list(schema.get("required", ()))
    if not fields:
        more = schema.get("additionalProperties", {})
        inner = values_of(more, definitions) if isinstance(more, Mapping) else anything
        return st.dictionaries(st.text(max_size=8), inner, max_size=3)
    others = [name for name in fields if name not in required]
    pick = st.lists(st.sampled_from(others), max_size=4, unique=True) if others else st.just([])
    return pick.flatmap(
        lambda chosen: st.fixed_dictionaries(
            {
                name: KNOWN[name] if name in KNOWN else values_of(fields[name], definitions)
                for name in [*required, *chosen]
            }
        )
    )


@st.composite
def bodies(draw: st.DrawFn, path: str, schema: Schema, definitions: Schema) -> dict[str, Any]:
    """A body for one route: three of four as the schema says, the others with one field spoilt, lost or
    unknown.

    Answers are kept short, so that thousands of cases take minutes.
    """
    body = draw(
        _objects(definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema, definitions)
    )
    if path in MAKES_TEXT:
        longest = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        body |= {longest: draw(st.integers(0, 12)), "stream": draw(st.booleans())}
        if not draw(st.integers(0, 5)):
            body["response_format"] = draw(values_of({"$ref": "#/ResponseFormat"}, definitions))
        if "max_completion_tokens" in body:
            body["max_completion_tokens"] = draw(st.integers(0, 6))
    if path == "/tokenize":  # takes one of two
        body.pop("messages" if "prompt" in body else "prompt", None)
        body |= {} if "messages" in body else {"prompt": draw(st.text(max_size=20))}
    spoil = draw(st.sampled_from(["", "", "", "value", "lose", "add"]))
    if spoil == "add":
        body[draw(st.text(max_size=8))] = draw(anything)
    elif spoil and body:
        name = draw(st.sampled_from(sorted(body)))
        if spoil == "lose" and name not in ("max_tokens", "max_output_tokens"):
            del body[name]
        else:
            body[name] = draw(anything)
            if name.startswith("max_") and isinstance(body[name], int):
                body[name] = min(body[name], 0) or 2**40  # long answers are another test's business
    return body


@dataclass(frozen=True)
class Raw:
    """A request below the level of JSON."""

    method: str
    path: str
    content: bytes
    headers: dict[str, str]


@st.composite
def raws(draw: st.DrawFn, paths: list[str], good: dict[str, Any]) -> Raw:
    """Any bytes, a good body that is cut or spoilt, any method, content type and headers, on known and
    unknown paths."""
    whole = json.dumps(good).encode()
    cut, byte = draw(st.integers(0, len(whole))), draw(st.binary(min_size=1, max_size=3))
    spoilt = [
        whole[:cut],
        whole[:cut] + byte + whole[cut:],
        whole + whole,
        b"[" * 2000,
        b'{"a":' * 2000,
        whole.replace(b"3", b"NaN"),
        whole.replace(b"3", b"1e999"),
        b'{"prompt": "\\ud800", "max_tokens": 1}',
        b"\xef\xbb\xbf" + whole,
        draw(st.binary(max_size=60)),
    ]
    names = st.sampled_from(
        ["x-request-id", "authorization", "accept", "transfer-encoding-x", "origin", "range"]
    )
    ascii_text = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
    headers = draw(st.dictionaries(names, ascii_text, max_size=2))
    kinds = ["application/json"] * 5 + [
        "text/plain",
        "application/json; charset=latin-1",
        "multipart/form-data",
        "",
    ]
    headers["content-type"] = draw(st.sampled_from(kinds))
    method = draw(st.sampled_from(["POST"] * 6 + ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"]))
    path = draw(
        st.sampled_from([*paths, "/v1/models/%0a%ff", "/v1/models/tiny", "/nowhere", "/v1/../metrics", "//"])
    )
    return Raw(method, path, draw(st.sampled_from(spoilt)), headers)

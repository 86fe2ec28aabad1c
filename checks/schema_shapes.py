"""Every keyword of JSON Schema, drafts 4 to 2020-12, in the shapes that the public test suite tries it in:
written anew, one schema or more for each group of tests there, the optional ones included. Only that a
compiler takes or refuses them matters here, not what they accept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

INT: dict[str, Any] = {"type": "integer"}
STR: dict[str, Any] = {"type": "string"}
FOO: dict[str, Any] = {"foo": INT}
FOO_BAR: dict[str, Any] = {"foo": INT, "bar": STR}
HERE = "https://shapes.example/"
DRAFTS = (
    "http://json-schema.org/draft-04/schema#",
    "http://json-schema.org/draft-06/schema#",
    "http://json-schema.org/draft-07/schema#",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
)
ODD_NAMES = (
    "foo\nbar",
    'foo"bar',
    "foo\\bar",
    "foo\tbar",
    "foo\fbar",
    "$ref",
    "a/b",
    "a~b",
    "c%d",
    "__proto__",
    "",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -2, 1.0, 0.0, 1e308, 2**60, "", "a", "\0", "hello\0there", "é", "𝒳"),
    *([], [False], [0], [[]], {}, {"a": False}, {"a": 0}, {"foo": "bar", "baz": "bax"}, [{"foo": "bar"}]),
)
FORMATS = (
    *(
        "date",
        "date-time",
        "time",
        "duration",
        "email",
        "idn-email",
        "hostname",
        "idn-hostname",
        "ipv4",
        "ipv6",
    ),
    *("uri", "uri-reference", "uri-template", "iri", "iri-reference", "uuid", "regex", "json-pointer"),
    *("relative-json-pointer", "unknown", "ecmascript-regex", "color"),
)
PATTERNS = (
    *(
        "^a*$",
        "a+",
        "^f.*o$",
        "a.+b",
        "\\d",
        "^\\d+$",
        "^\\W+$",
        "\\p{Letter}cole",
        "\\wcole",
        "^\\cC$",
        "^\\S$",
    ),
    *(
        "[a-z]cole",
        "^🐲*$",
        "^\\u{1F432}$",
        "\\a",
        "^\\p{digit}+$",
        "^\\t$",
        "^abc\\Z",
        "(?<year>\\d{4})",
        "^(?!x)y",
    ),
    *("f.*\\/", "^x{2,}$", "(?:ab|cd){1,3}", "[^\\d\\s]", "\\bword\\b", "^$", "(", "a{3,1}", "\\1(a)"),
)
NUMBERS = (0, 1, -2, 1.5, 0.01, 1e-8, 300, 2**31, 1e308, 123456789, 0.123456789, 10**40, -(10**20), 1.0)


def shapes() -> Iterator[tuple[str, Any]]:
    """(name, schema), each also inside an object, an array, a combination and a definition."""
    for name, schema in _plain():
        yield name, schema
        yield f"{name} in properties", {"type": "object", "properties": {"x": schema}, "required": ["x"]}
        yield f"{name} in items", {"type": "array", "items": schema, "maxItems": 3}
        yield f"{name} in allOf", {"allOf": [schema, {"description": "and nothing else"}]}
        yield f"{name} by reference", {"$defs": {"a": schema}, "$ref": "#/$defs/a"}


def _plain() -> Iterator[tuple[str, Any]]:
    for group in (
        _values,
        _numbers,
        _strings,
        _arrays,
        _objects,
        _combined,
        _references,
        _identifiers,
        _dynamic,
    ):
        yield from ((f"{group.__name__[1:]} {number}", schema) for number, schema in enumerate(group()))


def _values() -> Iterator[Any]:
    """type, enum, const, boolean schemas, default, content, unknown keywords, annotations."""
    yield from (True, False, {})
    kinds = (
        "integer",
        "number",
        "string",
        "object",
        "array",
        "boolean",
        "null",
        "any",
        ["integer", "string"],
    )
    yield from ({"type": kind} for kind in (*kinds, ["array", "object", "null"], [], ["string"], 5))
    yield from ({"const": value} for value in VALUES)
    yield from ({"enum": [value]} for value in VALUES)
    yield {"enum": [6, "foo", [], True, {"foo": 12}]}
    yield {"enum": []}
    yield {
        "type": "object",
        "properties": {"foo": {"enum": ["foo"]}, "bar": {"enum": ["bar"]}},
        "required": ["bar"],
    }
    yield from ({"properties": {"foo": {"type": "integer", "default": d}}} for d in ([], 5, None))
    yield {"properties": {"bar": {"type": "string", "minLength": 4, "default": "bad"}}}
    yield from ({"contentMediaType": m} for m in ("application/json", "text/html"))
    yield {
        "contentMediaType": "application/json",
        "contentEncoding": "base64",
        "contentSchema": {"required": ["foo"]},
    }
    yield {
        "unknownKeyword": {"$id": "x"},
        "$comment": "c",
        "readOnly": True,
        "deprecated": True,
        "examples": [5],
    }
    yield from ({"$schema": draft, "type": "integer"} for draft in DRAFTS)
    yield {"$schema": HERE + "no-such-draft", "properties": FOO}
    yield {"$vocabulary": {HERE + "vocab": True}, "minimum": 5}


def _numbers() -> Iterator[Any]:
    """minimum, maximum, exclusive ones in both forms, multipleOf, big numbers."""
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
        for kind in ("number", "integer"):
            yield from ({"type": kind, name: number} for number in NUMBERS)
        yield {name: 1.1}
    yield {"type": "number", "minimum": 1.1, "exclusiveMinimum": True}
    yield {"type": "number", "maximum": 3.0, "exclusiveMaximum": True}
    yield {"type": "integer", "minimum": 5, "maximum": 4}
    yield {"type": "integer", "multipleOf": 3, "minimum": 10, "maximum": 11}
    yield {"type": "number", "minimum": 972783798187987123879878123.18878137, "maximum": 1e300}
    yield {"type": "integer", "multipleOf": 0}


def _strings() -> Iterator[Any]:
    """minLength, maxLength, pattern, format, and all together."""
    yield from (
        {"type": "string", name: n} for name in ("minLength", "maxLength") for n in (0, 1, 2, 2.0, -1, 10**9)
    )
    yield from ({"type": "string", "pattern": pattern} for pattern in PATTERNS)
    yield from ({"pattern": pattern} for pattern in PATTERNS)
    yield from ({"type": "string", "format": name} for name in FORMATS)
    yield from ({"format": name} for name in FORMATS)
    yield {"type": "string", "minLength": 3, "maxLength": 2}
    yield {"type": "string", "pattern": "^a+$", "format": "date", "maxLength": 5}
    yield {"type": "string", "pattern": "^[a-z]*$", "minLength": 2, "maxLength": 4, "enum": ["ab", "toolong"]}


def _arrays() -> Iterator[Any]:
    """items in three forms, additionalItems, prefixItems, contains, sizes, unique and unevaluated items."""
    for items in (
        INT,
        True,
        False,
        [INT, STR],
        [],
        [True, False],
        {"type": "array", "items": {"items": INT}},
    ):
        yield {"items": items}
        yield {"type": "array", "items": items, "additionalItems": False}
        yield {"type": "array", "items": items, "additionalItems": INT, "minItems": 1}
    for prefix in ([INT, STR], [True, False], [{}], [INT] * 12):
        yield {"prefixItems": prefix}
        yield {"type": "array", "prefixItems": prefix, "items": False}
        yield {
            "type": "array",
            "prefixItems": prefix,
            "items": {"type": "number"},
            "maxItems": 3,
            "minItems": 2,
        }
    for name in ("minItems", "maxItems"):
        yield from ({"type": "array", name: n} for n in (0, 1, 2.0, -1, 10**9))
    for contains in ({"minimum": 5}, {"const": 5}, True, False, {"type": "null"}):
        yield {"contains": contains}
        yield {"type": "array", "contains": contains, "minContains": 0, "maxContains": 2}
        yield {"type": "array", "contains": contains, "items": {"multipleOf": 2}, "minContains": 2}
    for unique in (True, False):
        yield {"uniqueItems": unique, "prefixItems": [{"type": "boolean"}] * 2, "items": False}
        yield {"type": "array", "uniqueItems": unique, "items": [INT, INT], "additionalItems": False}
    for more in (True, False, STR):
        yield {"type": "array", "unevaluatedItems": more}
        yield {
            "prefixItems": [STR],
            "unevaluatedItems": more,
            "anyOf": [{"prefixItems": [True, {"const": "bar"}]}],
        }
        yield {
            "allOf": [{"contains": {"multipleOf": 2}}, {"contains": {"multipleOf": 3}}],
            "unevaluatedItems": more,
        }
    yield {"type": "array", "minItems": 3, "maxItems": 2}


def _objects() -> Iterator[Any]:
    """properties, required, patterns, names, sizes, dependencies in all forms, unevaluated properties."""
    yield {"properties": FOO_BAR}
    yield {"properties": {"foo": True, "bar": False}}
    yield {"properties": dict.fromkeys(ODD_NAMES, INT), "required": list(ODD_NAMES)}
    yield {"properties": {name: {"type": "number"} for name in ("toString", "constructor", "length")}}
    yield {"properties": {"foo": None}}
    for required in ([], ["foo"], ["foo", "foo"], ["nowhere"], list(ODD_NAMES), "foo", True):
        yield {"properties": FOO, "required": required}
        yield {"type": "object", "required": required, "additionalProperties": False}
    for more in (True, False, {"type": "boolean"}):
        yield {"additionalProperties": more}
        yield {
            "properties": {"foo": {}, "bar": {}},
            "patternProperties": {"^v": {}},
            "additionalProperties": more,
        }
        yield {"allOf": [{"properties": FOO}], "additionalProperties": more}
        yield {"unevaluatedProperties": more, "properties": FOO}
        yield {"unevaluatedProperties": more, "allOf": [{"properties": FOO}, {"required": ["foo"]}]}
        yield {
            "unevaluatedProperties": more,
            "if": {"properties": FOO, "required": ["foo"]},
            "then": {"required": ["b"]},
        }
        yield {
            "unevaluatedProperties": more,
            "dependentSchemas": {"foo": {"properties": {"bar": {"const": "bar"}}}},
        }
        yield {"$ref": "#/$defs/a", "unevaluatedProperties": more, "$defs": {"a": {"properties": FOO}}}
    for pattern in PATTERNS:
        yield {"type": "object", "patternProperties": {pattern: INT}}
    yield {"patternProperties": {"f.*o": INT, "[0-9]{2,}": {"type": "boolean"}, "X_": STR, "b.*": False}}
    for names in (
        {"maxLength": 3},
        {"pattern": "^a+$"},
        True,
        False,
        {"enum": ["foo", "bar"]},
        {"const": "foo"},
    ):
        yield {"type": "object", "propertyNames": names}
    for name in ("minProperties", "maxProperties"):
        yield from ({"type": "object", name: n} for n in (0, 1, 2.0, -1, 10**6))
    for needs in (["foo"], [], {"properties": FOO_BAR}, True, False, "foo", ["foo", "quux"]):
        yield {"dependencies": {"bar": needs}}
        yield {"type": "object", "properties": FOO_BAR, "dependencies": {"foo\nbar": needs, 'foo"bar': needs}}
        yield {"dependentRequired": {"bar": needs}}
        yield {
            "dependentSchemas": {"bar": needs if isinstance(needs, dict | bool) else {}},
            "properties": {"foo": {}},
        }


def _combined() -> Iterator[Any]:
    """allOf, anyOf, oneOf, not, if."""
    parts: tuple[list[Any], ...] = (
        [INT, {"minimum": 2}],
        [
            {"properties": {"bar": INT}, "required": ["bar"]},
            {"properties": {"foo": STR}, "required": ["foo"]},
        ],
        *([True, True], [True, False], [False, False], [{}], [{}, {"type": "number"}], []),
        [{"maximum": 30}, {"minimum": 20}],
        [{"type": "null"}, {"type": "null"}],
        [{"required": ["foo", "bar"]}, {"required": ["foo", "baz"]}],
        [{"properties": {"a": {"const": "x"}}}, {"properties": {"a": {"const": "y"}}}],
    )
    for name in ("allOf", "anyOf", "oneOf"):
        for several in parts:
            yield {name: several}
            yield {"type": ["object", "integer"], name: several, "properties": {"baz": {"type": "null"}}}
            yield {name: [{name: several}]}
        yield {name: [{"type": "null"}] * 30}
    yield {"allOf": [{"multipleOf": 2}], "anyOf": [{"multipleOf": 3}], "oneOf": [{"multipleOf": 5}]}
    for inner in (
        INT,
        {"type": ["integer", "boolean"]},
        True,
        False,
        {},
        {"not": {}},
        {"properties": {"foo": STR}},
    ):
        yield {"not": inner}
        yield {"type": "object", "properties": {"foo": {"not": inner}}}
    for keys in (("if",), ("then",), ("else",), ("if", "then"), ("if", "else"), ("if", "then", "else")):
        conditions = {"if": {"exclusiveMaximum": 0}, "then": {"minimum": -10}, "else": {"multipleOf": 2}}
        yield {key: conditions[key] for key in keys}
        yield {"type": "object", **{key: {"properties": {"a": {"const": key}}} for key in keys}}
    yield {"if": True, "then": {"const": "then"}, "else": {"const": "else"}}
    yield {"allOf": [{"if": {"const": 1}}, {"then": {"minimum": -10}}, {"else": {"multipleOf": 2}}]}


def _references() -> Iterator[Any]:
    """$ref: root, relative, escaped, nested, beside others, remote, to what is no schema, in a circle."""
    yield {"properties": {"foo": {"$ref": "#"}}, "additionalProperties": False}
    yield {"properties": {"foo": INT, "bar": {"$ref": "#/properties/foo"}}}
    yield {"prefixItems": [INT, {"$ref": "#/prefixItems/0"}], "items": [INT, {"$ref": "#/items/0"}]}
    names = ("tilde~field", "slash/field", "percent%field")
    places = (
        "#/$defs/tilde~0field",
        "#/$defs/slash~1field",
        "#/$defs/percent%25field",
        "#/$defs/tilde~2field",
    )
    yield {"$defs": dict.fromkeys(names, INT), "properties": {p[-5:]: {"$ref": p} for p in places}}
    yield {"$defs": {"a": INT, "b": {"$ref": "#/$defs/a"}, "c": {"$ref": "#/$defs/b"}}, "$ref": "#/$defs/c"}
    yield {"$defs": {"r": {"type": "array"}}, "properties": {"foo": {"$ref": "#/$defs/r", "maxItems": 2}}}
    yield from ({"$ref": draft} for draft in DRAFTS)
    yield {"properties": {"$ref": STR}}
    yield {"properties": {"$ref": {"$ref": "#/$defs/is-string"}}, "$defs": {"is-string": STR}}
    yield from (
        {"$ref": "#/$defs/bool", "$defs": {"bool": value}} for value in (True, False, 5, None, [], "text")
    )
    yield {"$defs": {"": {"$defs": {"": {"type": "number"}}}}, "allOf": [{"$ref": "#/$defs//$defs/"}]}
    yield {"const": {"$ref": "#/$defs/a"}, "$defs": {"a": INT}}
    yield {"enum": [{"$ref": "#/$defs/a"}], "$defs": {"a": INT}}
    yield {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    yield {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}
    yield {"$ref": "#"}
    yield from (
        {"$ref": place}
        for place in ("", "#/", "#/nowhere/at/all", "#nowhere", "other.json", HERE + "x#/a", 5)
    )
    yield from (
        {"$ref": HERE + place} for place in ("integer.json", "sub.json#/$defs/a", "nested/string.json")
    )
    tree = {
        "properties": {
            "value": {"type": "number"},
            "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}},
        }
    }
    yield {"$ref": "#/$defs/node", "$defs": {"node": tree | {"type": "object", "required": ["value"]}}}
    yield {
        "allOf": [{"$ref": "#/$defs/int"}, {"properties": {"foo": {"$ref": "#/$defs/int"}}}],
        "$defs": {"int": INT},
    }


def _identifiers() -> Iterator[Any]:
    """$id, id, $anchor, base URIs that change on the way, identifiers where none belong."""
    for name in ("$id", "id"):
        yield {name: HERE + "root.json", "$ref": "#/$defs/a", "$defs": {"a": INT}}
        yield {
            name: HERE + "root.json",
            "$ref": "sub.json",
            "$defs": {"a": {name: "sub.json", "type": "integer"}},
        }
        yield {name: HERE, "items": {name: "folder/", "items": {"$ref": "item.json"}}}
        yield {name: "urn:uuid:deadbeef-1234-ff00-00ff-4321feebdaed", "$ref": "urn:uuid:deadbeef#/$defs/a"}
        yield {"enum": [{name: HERE + "not-an-id", "type": "null"}], "$ref": HERE + "not-an-id"}
        yield {"properties": {name: {"type": "string"}}, name: "#frag"}
        yield {name: 5, "type": "string"}
    yield {"$ref": "#foo", "$defs": {"A": {"$anchor": "foo", "type": "integer"}}}
    yield {
        "$ref": HERE + "nested.json#foo",
        "$id": HERE + "root",
        "$defs": {"A": {"$id": "nested.json", "$anchor": "foo"}},
    }
    yield {
        "$defs": {"a": {"$anchor": "x", "const": 1}, "b": {"$id": "other", "$anchor": "x", "const": 2}},
        "$ref": "#x",
    }
    yield {"$ref": "#", "$id": "", "$anchor": ""}
    yield {
        "not": {"$comment": "a reference through an unknown keyword", "$ref": "#/unknown/a"},
        "unknown": {"a": INT},
    }


def _dynamic() -> Iterator[Any]:
    """$dynamicRef and $recursiveRef, with and without anchors that they look for."""
    yield {"$dynamicRef": "#items", "$defs": {"a": {"$dynamicAnchor": "items", "type": "string"}}}
    yield {
        "type": "array",
        "items": {"$dynamicRef": "#items"},
        "$defs": {"a": {"$anchor": "items", "type": "string"}},
    }
    yield {
        "$id": HERE + "root",
        "$ref": "list",
        "$defs": {
            "foo": {"$dynamicAnchor": "items", "type": "string"},
            "list": {
                "$id": "list",
                "type": "array",
                "items": {"$dynamicRef": "#items"},
                "$defs": {"items": {"$dynamicAnchor": "items"}},
            },
        },
    }
    yield {"$dynamicRef": "#nowhere"}
    yield {"$dynamicAnchor": "node", "type": "object", "properties": {"next": {"$dynamicRef": "#node"}}}
    for anchor in (True, False):
        yield {
            "$recursiveAnchor": anchor,
            "properties": {"foo": {"$recursiveRef": "#"}},
            "additionalProperties": False,
        }
        yield {"$id": HERE, "$recursiveAnchor": anchor, "anyOf": [INT, {"items": {"$recursiveRef": "#"}}]}

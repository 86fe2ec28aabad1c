"""Parts of grammars in Lark, as llguidance reads them: texts as regular expressions, JSON by a schema."""

from __future__ import annotations

import json
from typing import Any

# Between the parts of JSON: a space or nothing. Without a bound small models never stop.
SPACES: Any = {"whitespace_pattern": " ?"}
# that llguidance knows
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
_VALUES = frozenset({"const", "enum", "default", "examples"})  # keywords whose values are no schemas


def known_formats(schema: Any) -> Any:
    """The schema without formats that llguidance does not know: JSON Schema calls `format` an annotation, and
    a "path" or a "binary" is any text."""
    if isinstance(schema, list):
        return [known_formats(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: v for k, v in schema.items() if k != "format" or not isinstance(v, str) or v in _FORMATS}
    return {k: v if k in _VALUES else known_formats(v) for k, v in kept.items()}


def json_by(schema: dict[str, Any]) -> str:
    """The right side of a rule: JSON that this schema allows."""
    return f"%json {json.dumps({**known_formats(schema), 'x-guidance': SPACES})}"


def escaped(text: str) -> str:
    """The regular expression of a text: texts in Lark cannot hold every character."""
    return "".join(f"\\x{{{ord(c):x}}}" if not c.isalnum() else c for c in text)

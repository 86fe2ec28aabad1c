"""Personal secrets in texts: mail addresses, keys and tokens, masked before anything is learnt from them."""

from __future__ import annotations

import re

_KINDS: dict[str, re.Pattern[str]] = {
    "private key": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
    ),
    "token": re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}"
        r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|pypi-[\w-]{20,}|npm_[A-Za-z0-9]{30,}"
        r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
    ),
    "bearer": re.compile(r"(?<=Bearer )[\w.~+/-]{15,}[\w~+/=-]", re.IGNORECASE),
    "password": re.compile(
        r"(?i)((?:api[_-]?key|secret|passw(?:or)?d|access[_-]?token)\\?[\"']?\s*[:=]\s*\\?[\"']?)([^\s\"'\\,;<>]{8,})"
    ),
    "mail address": re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"),
}


def mask_secrets(text: str, counts: dict[str, int]) -> str:
    """The text with <private key>, <token>, ... in place of what looks like one; `counts` by kind."""
    for kind, pattern in _KINDS.items():
        mark = rf"\1<{kind}>" if pattern.groups else f"<{kind}>"
        text, found = pattern.subn(mark, text)
        if found:
            counts[kind] = counts.get(kind, 0) + found
    return text

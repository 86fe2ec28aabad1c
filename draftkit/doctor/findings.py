"""What an examination says: findings, each with its cost and its mend, and facts, which are no faults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One fault. `check` is its name, `what` was found, what it costs, and what to do."""

    check: str
    what: str
    cost: str
    mend: str

    def line(self) -> str:
        """All of it in one line."""
        return f"{self.check}: {self.what}; cost: {self.cost}; mend: {self.mend}"


@dataclass(frozen=True)
class Examination:
    """The findings of all checks; `facts` are sentences, `numbers` what they were made of."""

    findings: tuple[Finding, ...]
    facts: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)

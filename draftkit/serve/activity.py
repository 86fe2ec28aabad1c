"""A line in the server's log every ten seconds in which tokens were made: speed, load, accepted length."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("draftkit.serve")
PERIOD = 10.0  # seconds


@dataclass(frozen=True)
class _Look:
    """What was counted at a time."""

    time: float
    generated: int
    metrics: Any  # EngineMetrics


class ActivityLog:
    """`look` is told the time as often as one likes; it writes a line when ten seconds have passed in which
    the engine made tokens."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self._last: _Look | None = None

    def due(self, now: float) -> bool:
        """Whether it is time to look."""
        return self._last is None or now - self._last.time >= PERIOD

    def look(self, now: float, generated: int, metrics: Any) -> None:
        """`generated` tokens and the engine's counters since the start."""
        before, self._last = self._last, _Look(now, generated, metrics)
        if before is not None and generated > before.generated:
            log.info(described(before, self._last, self._gamma))


def described(before: _Look, after: _Look, gamma: int) -> str:
    """What happened between two looks, in one line."""
    speed = (after.generated - before.generated) / (after.time - before.time)
    now = after.metrics
    parts = [f"{speed:.1f} tokens/s", f"{now.running} running", f"{now.waiting} waiting"]
    grown = {
        name: getattr(now, name) - getattr(before.metrics, name)
        for name in ("rounds", "drafted", "verified", "accepted")
    }
    if gamma and grown["rounds"]:
        parts.append(f"accepted length {1 + grown['accepted'] / grown['rounds']:.2f}")
        parts.append(f"drafted in {100 * grown['drafted'] / (gamma * grown['rounds']):.0f} % of rounds")
    if grown["verified"]:
        parts.append(f"{100 * grown['accepted'] / grown['verified']:.0f} % of verified drafts accepted")
    if now.gate is not None and not now.gate.drafting and now.gate.with_drafts:
        with_it, alone = now.gate.with_drafts, now.gate.without_drafts
        parts.append(f"the drafter rests: {with_it:.0f} tokens/s with it, {alone:.0f} without")
    return f"last {after.time - before.time:.0f} s: " + ", ".join(parts)

"""Numbers on the command line: repeated, or several after one option with commas between them."""

from __future__ import annotations

from collections.abc import Sequence

from draftkit.errors import ConfigError


def whole_numbers(option: str, given: Sequence[str] | None) -> list[int]:
    """`["1,8", "64"]` as [1, 8, 64]. Raises ConfigError that names the option."""
    words = [word.strip() for one in given or () for word in one.split(",")]
    if wrong := [word for word in words if not word.isdecimal() or int(word) < 1]:
        raise ConfigError(f"{option} {wrong[0]!r}: give whole numbers, 1 or more, as 1,8,64")
    return [int(word) for word in words]

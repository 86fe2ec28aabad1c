"""Files that somebody else wrote to do harm: recipes that grow, tables of impossible numbers, compiled
code that is not ours. Each is one line, and costs next to nothing."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from draftkit.config import load_recipe
from draftkit.errors import ConfigError, DataError, ScheduleError
from draftkit.ops import native_build
from draftkit.ops.native_build import NoNative, load_library
from draftkit.schedule.step_rate_table import load_step_rate

_NAMES = "abcdefghijklmnopqrstuvwxyz"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(_NAMES))
RECIPES = {  # and what refuses each, before it costs what it might
    "aliases that double": (BOMB, r"aliases \(\*name\) are not taken"),
    "merges": (
        "base: &base {a: 1}\n" + "".join(f"k{i}:\n  <<: *base\n" for i in range(24)),
        r"aliases \(\*name\) are not taken",
    ),
    "a scalar of 20 MB": ("name: " + "x" * (20 * 2**20), "has 20971526 bytes; a recipe has 262144 at most"),
    "a number of 5,000 digits": ("train: {steps: " + "9" * 5000 + "}", "a value that cannot be read"),
    "nested": ("name: " + "[" * 20_000 + "]" * 20_000, "nested too deeply for a recipe"),
    "nested a little": ("name: " + "[" * 500 + "]" * 500, "nested too deeply for a recipe"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_grows_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path, (text, told) = tmp_path / "recipe.yaml", RECIPES[name]
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        load_recipe(str(path), [])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("rate", [10**40, 10**400, float("nan"), float("inf"), "1", None, -1, [1]], ids=repr)
def test_a_step_rate_that_cannot_be_is_one_line(rate: Any, tmp_path: Path) -> None:
    path = tmp_path / "rate.json"
    path.write_text(json.dumps({"sample_batch_tokens": [1, 2], "sample_steps_per_sec": [rate, rate]}))
    with pytest.raises(ScheduleError, match=str(path)) as caught:
        load_step_rate(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache, and a compiler that makes nothing worth loading."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "_build", lambda command, library: library.write_bytes(b"no library"))
    return tmp_path / "draftkit"


def test_compiled_code_that_others_can_write_is_not_loaded(cache: Path) -> None:
    with pytest.raises(NoNative, match=r"invalid ELF|too short|not a"):
        load_library("step")  # it is ours, and it is tried
    [planted] = cache.iterdir()
    planted.chmod(0o666)
    with pytest.raises(NoNative, match=f"^{planted}: belongs to another user, or others can write it"):
        load_library("step")
    planted.chmod(0o644)
    cache.chmod(0o777)
    with pytest.raises(NoNative, match=f"^{cache}: belongs to another user, or others can write it"):
        load_library("step")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_compiled_code_of_another_user_is_not_loaded(cache: Path) -> None:
    with pytest.raises(NoNative):
        load_library("step")
    [planted] = cache.iterdir()
    os.chown(planted, 12345, 12345)
    with pytest.raises(NoNative, match="belongs to another user"):
        load_library("step")


def test_no_home_is_a_reason_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(NoNative, match=r"no cache folder .*; set XDG_CACHE_HOME"):
        load_library("step")


def test_rows_of_deep_or_huge_json_are_named(tmp_path: Path) -> None:
    from draftkit.data.conversations import read_conversations

    path = tmp_path / "rows.jsonl"
    for row in ("[" * 100_000, '{"id": ' + "9" * 5000 + "}", '{"messages": ' + '{"a":' * 50_000):
        path.write_text(row + "\n")
        with pytest.raises(DataError, match=f"{path}:1: ") as caught:
            read_conversations([path])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

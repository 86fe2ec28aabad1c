"""Compiled code is run only when nobody else can have written it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from draftkit.ops import native_build
from draftkit.ops.native_build import NoNative, load_library


@pytest.mark.parametrize("place", ["folder", "file"])
def test_what_others_can_write_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A planted library of the right name: loading it would be an error of another kind, since it is none."""

    def plant(command: list[str], library: Path) -> None:
        library.write_bytes(b"not a library")
        library.chmod(0o666 if place == "file" else 0o644)

    monkeypatch.setattr(native_build, "_build", plant)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "draftkit").mkdir()
    (tmp_path / "draftkit").chmod(0o777 if place == "folder" else 0o755)
    with pytest.raises(NoNative, match="others can write it"):
        load_library("step")


def test_another_users_file_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    status = os.stat_result((0o100644, 0, 0, 0, 54321, 0, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda self: status)
    with pytest.raises(NoNative, match="belongs to another user"):
        native_build._check_owner(tmp_path)


def test_no_home_folder_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(NoNative, match="set XDG_CACHE_HOME"):
        load_library("step")

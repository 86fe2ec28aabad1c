"""The README names what exists: every path, every command, every folder of the package."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from draftkit import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PATHS = re.findall(r"`((?:draftkit|tests|docs|benchmarks|checks|tools)/[\w./-]*)`", README)


def test_every_path_in_the_readme_exists() -> None:
    assert len(PATHS) > 10
    assert [path for path in PATHS if not (ROOT / path).exists()] == []


def test_every_command_in_the_readme_exists() -> None:
    known = {
        command.name or command.callback.__name__
        for command in cli.app.registered_commands
        if command.callback
    }
    named = set(re.findall(r"(?:^ {4}|`)draftkit ([a-z-]+)", README, re.MULTILINE))
    assert len(named) > 3
    assert named <= known


def test_every_make_target_in_the_readme_exists() -> None:
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", README, re.MULTILINE))
    assert named
    assert named <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_the_map_has_every_folder_and_module_of_the_package() -> None:
    folders = {f"draftkit/{path.parent.name}/" for path in (ROOT / "draftkit").glob("*/__init__.py")}
    modules = {f"draftkit/{path.name}" for path in (ROOT / "draftkit").glob("*.py")} - {
        "draftkit/__init__.py"
    }
    assert (folders | modules) - set(PATHS) == set()


def test_the_python_example_prints_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """With the packaged drafter in place of the one that the pipeline above it makes."""
    [example] = re.findall(r"^ {4}from draftkit import LLM.*\n(?: {4}.*\n)+", README, re.MULTILINE)
    exec(
        textwrap.dedent(example).replace(
            "drafter/best", str(ROOT / "draftkit" / "assets" / "tiny" / "drafter")
        ),
        {},
    )
    assert len(capsys.readouterr().out.split()) > 3

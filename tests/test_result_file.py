"""Results of benchmarks and checks say where they come from."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.result_file import write_result


def test_a_result_says_commit_command_date_device_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/checks/soak.py", "--requests", "5"])
    write_result({"good": True}, tmp_path / "results" / "soak.json")
    found = json.loads((tmp_path / "results" / "soak.json").read_text())
    made = found["made"]
    assert found["good"] is True and made["command"] == "python -m checks.soak --requests 5"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made["date"])
    assert {"device", "machine", "python", "torch", "transformers"} <= made.keys()
    assert re.fullmatch(r"([0-9a-f]{7,}\+?)?", made["commit"])


def test_every_result_is_cited_by_a_document_or_a_script() -> None:
    root = Path(__file__).parents[1]
    sources = [*root.glob("*.md"), *(root / "docs").rglob("*.md")]
    sources += [p for name in ("benchmarks", "checks", "tests") for p in (root / name).glob("*.py")]
    sources += (root / "benchmarks").glob("*.yaml")
    text = "\n".join(path.read_text("utf-8") for path in sources)
    results = [p for name in ("benchmarks", "checks") for p in (root / name / "results").iterdir()]
    assert results and not [p.name for p in results if p.name not in text]

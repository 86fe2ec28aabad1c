"""A module imports its own folder and lower levels only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "draftkit"
LEVELS = [
    {"errors", "config", "interrupt", "recipes", "__init__"},
    {"ops"},
    {"target"},
    {"draft"},
    {"data", "schedule", "decode"},
    {"train", "engine"},
    {"serve", "evaluate", "export"},
    {"tiny", "stages", "quickstart", "cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def violations(path: Path, source: str) -> list[str]:
    """Imports of `path` (relative to the package) that reach up or sideways."""
    own = path.parts[0].removesuffix(".py")
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "draftkit":
            names = [f"draftkit.{alias.name}" for alias in node.names if alias.name != "__version__"]
        for name in names:
            parts = name.split(".")
            if parts[0] != "draftkit" or len(parts) < 2 or parts[1] == own:
                continue
            if own == "cli" or (LEVEL[own] == len(LEVELS) - 1 and LEVEL[parts[1]] == len(LEVELS) - 1):
                continue  # the top level is one layer
            if LEVEL[parts[1]] >= LEVEL[own] and LEVEL[own] > 0:
                found.append(f"{path}:{node.lineno}: {own} imports {name}")
            if LEVEL[own] == 0 and LEVEL[parts[1]] > 0:
                found.append(f"{path}:{node.lineno}: {own} imports {name}")
    return found


def test_imports_go_down() -> None:
    found = [
        line
        for path in sorted(ROOT.rglob("*.py"))
        for line in violations(path.relative_to(ROOT), path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


def test_the_check_sees_an_import_that_goes_up() -> None:
    assert violations(Path("ops/verify.py"), "def f():\n    from draftkit.train import trainer\n")
    assert violations(Path("data/capture.py"), "import draftkit.decode")
    assert violations(Path("config.py"), "from draftkit.ops import verify")
    assert not violations(Path("train/trainer.py"), "from draftkit.data.features import FeatureStore")

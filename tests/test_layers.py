"""The import direction: a module imports its own folder and lower layers only, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "draftkit"

# From the bottom up. Folders on one line never import each other.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"artefact", "permissions", "suggest"}),
    frozenset({"settings"}),
    frozenset({"config", "interrupt", "output", "progress"}),
    frozenset({"ops"}),
    frozenset({"target"}),
    frozenset({"draft"}),
    frozenset({"data", "schedule", "decode"}),
    frozenset({"features"}),
    frozenset({"train", "engine"}),
    frozenset({"serve", "evaluate", "handover"}),
    frozenset({"stages"}),
    frozenset({"feature_stages", "train_stages"}),
    frozenset({"evaluate_stages", "schedule_stages", "plan"}),
    frozenset({"suite_stages", "doctor"}),
    frozenset({"quickstart", "specialise"}),
    frozenset({"commands"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Lower layers that a folder must leave alone all the same: models do not see recipes, a server does not
# train.
FORBIDDEN = {
    "ops": {"config"},
    "target": {"config"},
    "draft": {"config"},
    "serve": {"data", "features", "train"},
}


def imported_units(tree: ast.AST, units: set[str]) -> Iterator[tuple[int, str]]:
    """Line and first name below `draftkit` of every import in the tree, at any depth; "." for a relative
    import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "."
            continue
        elif isinstance(node, ast.ImportFrom) and node.module == "draftkit":
            names = [f"draftkit.{alias.name}" for alias in node.names if alias.name in units]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("draftkit."))


def violations(package: Path) -> list[str]:
    """One line for each import that goes sideways or up, and for each module that no layer names."""
    paths = sorted(p for p in package.rglob("*.py") if p != package / "__init__.py")
    units = {p.relative_to(package).parts[0].removesuffix(".py") for p in paths}
    found = [f"{unit}: is in no layer; add it to LAYERS" for unit in sorted(units - LEVEL.keys())]
    for path in paths:
        unit = path.relative_to(package).parts[0].removesuffix(".py")
        for line, other in imported_units(ast.parse(path.read_text("utf-8")), units):
            place = f"{path.relative_to(package.parent)}:{line}"
            if other == ".":
                found.append(f"{place}: relative import; write draftkit.{unit}...")
            elif other != unit and {unit, other} <= LEVEL.keys():
                if LEVEL[other] >= LEVEL[unit]:
                    found.append(f"{place}: {unit} imports {other}, which is not below it")
                elif other in FORBIDDEN.get(unit, ()):
                    found.append(f"{place}: {unit} must not import {other}")
    return found


def write(package: Path, **modules: str) -> Path:
    for name, text in modules.items():
        path = package / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return package


def test_every_import_goes_down() -> None:
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_the_documentation_shows_every_layer() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    shown = [line[4:42].split() for line in text.splitlines() if line.startswith("    ")]
    wanted = [names for names in reversed(LAYERS) if names != {"__main__"}]
    assert [set(names) for names in shown[: len(wanted)]] == wanted


def test_an_upward_import_is_found_also_inside_a_function(tmp_path: Path) -> None:
    lazy = "def f():\n    from draftkit.train.trainer import train\n"
    package = write(tmp_path / "draftkit", draft__block=lazy, train__trainer="import draftkit.draft.block\n")
    assert violations(package) == ["draftkit/draft/block.py:2: draft imports train, which is not below it"]


def test_siblings_of_one_layer_do_not_import_each_other(tmp_path: Path) -> None:
    package = write(
        tmp_path / "draftkit", data__capture="from draftkit import decode, __version__\n", decode=""
    )
    assert violations(package) == ["draftkit/data/capture.py:1: data imports decode, which is not below it"]


def test_forbidden_relative_and_unknown_modules_are_found(tmp_path: Path) -> None:
    package = write(
        tmp_path / "draftkit",
        ops__verify="from draftkit.config import Recipe\nfrom . import x\n",
        config="",
        extras="",
    )
    assert violations(package) == [
        "extras: is in no layer; add it to LAYERS",
        "draftkit/ops/verify.py:1: ops must not import config",
        "draftkit/ops/verify.py:2: relative import; write draftkit.ops...",
    ]


def test_no_test_file_imports_another() -> None:
    """What they share lies in `tests/support/`, so that a test file can be moved or deleted alone."""
    tests = Path(__file__).parent
    names = {p.stem for p in tests.glob("*.py")}
    for path in sorted(tests.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                modules = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                )
                for module in modules:
                    assert not names & set(module.split(".")), f"{path.name}:{node.lineno} imports {module}"

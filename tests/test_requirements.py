"""The package declares what it imports, and nothing that only tests, tools and benchmarks need."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def distribution(requirement: str) -> str:
    """The normalised name of a requirement: `PyYAML>=6` is `pyyaml`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[ ;<>=!~\[]", requirement)[0]).lower()


def imported() -> set[str]:
    """Distributions of the modules that `draftkit` imports, at the top of a file or inside a function."""
    owners = packages_distributions()
    modules: set[str] = set()
    for path in (ROOT / "draftkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    others = modules - sys.stdlib_module_names - {"draftkit"}
    return {distribution(owners.get(module, [module])[0]) for module in others}


def test_each_requirement_is_imported_and_each_import_is_required() -> None:
    required = {distribution(r) for r in PROJECT["dependencies"]}
    optional = {distribution(r) for rs in PROJECT["optional-dependencies"].values() for r in rs}
    found = imported()
    unused = required - found - {"jinja2"}  # transformers asks for it when a chat template is rendered
    assert not unused, f"no module of draftkit imports {sorted(unused)}; they belong to the extra `dev` or go"
    missing = (
        found - required - (optional - {distribution(r) for r in PROJECT["optional-dependencies"]["dev"]})
    )
    missing -= {"triton"}  # comes with torch where it exists; its kernels are imported on a GPU only
    assert not missing, f"draftkit imports {sorted(missing)}, which pyproject.toml does not name"

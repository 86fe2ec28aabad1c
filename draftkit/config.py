"""Recipes: typed YAML descriptions of a run. What can be set, and each default, is in `settings.py`.

`load_recipe` reads a file or a packaged recipe by name, applies `section.key=value` overrides, and reports
mistakes as one line that names the dotted field. No torch here: the command line imports this module.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from draftkit.errors import ConfigError
from draftkit.settings import (
    CHECKS,
    CaptureSettings,
    DrafterSettings,
    EvaluateSettings,
    GenerateSettings,
    TargetSettings,
    TrainSettings,
)
from draftkit.suggest import nearest, nearest_key, nearest_path

RECIPES = Path(__file__).parent / "recipes"
MAX_BYTES = 2**18


class Recipe(BaseModel):
    """The description of a run, from target to evaluation."""

    model_config = {**CHECKS, "frozen": True}

    name: str
    target: TargetSettings = TargetSettings()
    generate: GenerateSettings = GenerateSettings()
    capture: CaptureSettings = CaptureSettings()
    drafter: DrafterSettings = DrafterSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (6e-4 is a float), no key twice, and no aliases: they multiply, and a page of them is
    more than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One value; an error where it stands for another."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not taken; write the value out", problem_mark=mark
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    seen: set[str] = set()
    for key in scalars:
        if key.value in seen:
            raise yaml.MarkedYAMLError(
                problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or a packaged recipe by name, with overrides such as "train.lr=3e-4".

    Raises ConfigError: what was given, what is allowed, and the dotted field.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        hint = nearest(name_or_path, packaged_recipes()) or nearest_path(Path(name_or_path))
        allowed = f"; give a YAML file, or one of `draftkit recipes`: {', '.join(packaged_recipes())}"
        what = "is a folder and no recipe" if Path(name_or_path).is_dir() else "no such recipe"
        raise ConfigError(f"{name_or_path}: {what}{hint or allowed}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: has {path.stat().st_size} bytes; a recipe has {MAX_BYTES} at most")
    raw = _parse(path.read_bytes(), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: is a {type(raw).__name__}, must be a mapping with at least `name:`")
    for override in overrides:
        _apply(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        field, keys = _field(error), [override.partition("=")[0].strip() for override in overrides]
        given = any(f"{field}.".startswith(f"{key}.") for key in keys)
        raise ConfigError(f"{'--set ' if given else f'{path.name}: '}{_first(error)}") from error


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with draftkit."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def _parse(raw: bytes, where: str) -> Any:
    try:
        return yaml.load(raw.decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{where}:{line}: is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # what looks like a date or a number, and is none
        raise ConfigError(
            f"{where}: holds a value that cannot be read ({error}); put text in quotes"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where}: is nested too deeply for a recipe") from error


def _apply(raw: dict[str, Any], override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    *sections, key = field.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
    place[key] = _parse(text.encode(), f"override {override!r}")


def _meant(given: list[str], allowed: list[str]) -> str | None:
    """The dotted key that was probably meant: of the same section, or the same key of another one."""
    *section, name = given
    if key := nearest_key(name, allowed):
        return ".".join([*section, key])
    sections: dict[str, Any] = {other: field.annotation for other, field in Recipe.model_fields.items()}
    keys = {other: getattr(section, "__pydantic_fields__", {}) for other, section in sections.items()}
    return next((f"{other}.{name}" for other, own in keys.items() if name in own), None)


def _field(error: ValidationError) -> str:
    """The dotted field of the first mistake."""
    return ".".join(str(part) for part in error.errors()[0]["loc"])


def _first(error: ValidationError) -> str:
    """The first mistake in words, with its dotted field and, for an unknown key, the nearest allowed one."""
    mistake, field = error.errors()[0], _field(error)
    if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section: Any = Recipe
        for part in mistake["loc"][:-1]:
            items = isinstance(part, int)  # in a list of sections
            section = get_args(section)[0] if items else section.__pydantic_fields__[part].annotation
        allowed = list(section.__pydantic_fields__)
        meant = _meant([str(part) for part in mistake["loc"]], allowed)
        hint = f"did you mean {meant}?" if meant else f"allowed are {', '.join(allowed)}"
        return f"{field}: is not a known key; {hint}"
    if mistake["type"] == "missing":
        return f"{field}: is missing and must be given"
    if mistake["type"] == "dataclass_type":
        return f"{field}: must be a section with keys of its own, got {mistake['input']!r}"
    words = mistake["msg"].removeprefix("Input ").removeprefix("Value error, ")
    words = words.replace("should", "must", 1).replace("a valid ", "a ", 1)
    return (
        f"{field}: {words[0].lower()}{words[1:].replace('a integer', 'an integer')}, got {mistake['input']!r}"
    )

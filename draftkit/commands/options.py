"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftkit.commands.recipes import complete_recipe
from draftkit.errors import ConfigError

if TYPE_CHECKING:
    from draftkit.config import Recipe

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", help="a file, or one of `draftkit recipes`", autocompletion=complete_recipe
    ),
]
TargetOption = Annotated[
    str | None, typer.Option("--target", help="folder, GGUF file or hub id; default: the recipe's")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="override, e.g. train.lr=3e-4; repeatable")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="where results go")]
PromptsOption = Annotated[
    list[Path] | None, typer.Option("--prompts", "-p", help="JSONL; default: the embedded ones")
]
StartOption = Annotated[Path | None, typer.Option(help="folder of a drafter that goes on from where it is")]
LogFormatOption = Annotated[
    str | None, typer.Option("--format", help="bodies, vllm, otel, claude-code or codex; default: recognised")
]
SkipOption = Annotated[
    bool, typer.Option("--skip-invalid", help="leave out rows that are wrong, and count them")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]

FromOption = Annotated[
    str | None, typer.Option("--from", help="vllm=URL: a vLLM server reads them (docs/features.md)")
]
ProbeOption = Annotated[
    bool,
    typer.Option("--probe/--no-probe", help="compare a server's or stored layers with the target's first"),
]

LIBRARIES = "loading PyTorch and Transformers"  # what a command is doing before it says anything


def with_target(overrides: list[str] | None, target: str | None) -> list[str]:
    """The overrides of a recipe, `--target` among them."""
    return [*(overrides or []), *([f"target.path={target}"] if target else [])]


def recipe_of(name: str, overrides: list[str] | None) -> Recipe:
    """The recipe, read before anything heavy is imported: a mistake in it shows at once."""
    from draftkit.config import load_recipe

    return load_recipe(name, overrides or [])


def parse_from(text: str) -> str:
    """The URL of "vllm=URL". Raises ConfigError for anything else."""
    kind, _, url = text.partition("=")
    if kind != "vllm" or not url.startswith(("http://", "https://")):
        raise ConfigError(f"--from {text}: give vllm=http://HOST:PORT")
    return url

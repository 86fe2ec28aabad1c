"""`draftkit export`: a drafter in another form, or for another engine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from draftkit.commands.early import check_engine, check_given, check_pair
from draftkit.commands.options import LIBRARIES, JsonOption, OutOption
from draftkit.draft.place import check_drafter
from draftkit.errors import ConfigError
from draftkit.output import as_json, check_kind, make_folder
from draftkit.progress import doing

EXAMPLE = "Example: draftkit export -d drafter/best -o handed --for vllm --target Qwen/Qwen3-4B"


def command(
    out: OutOption,
    drafter: Annotated[Path, typer.Option("--drafter", "-d", help="drafter folder, in any known form")],
    engine: Annotated[
        str | None,
        typer.Option("--for", help="engine: vllm, sglang, llama.cpp or mlx"),
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="portable (the default), deepspec; of DeepSeek-V4 bundled, dspark")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float64")] = "bfloat16",
    target: Annotated[
        str | None, typer.Option(help="folder, GGUF file or hub name; lends what the drafter's folder lacks")
    ] = None,
    borrow: Annotated[
        bool, typer.Option("--borrow", help="leave out embedding and head, which are the target's")
    ] = False,
    borrow_rows: Annotated[
        bool,
        typer.Option(
            "--borrow-rows", help="a reduced head, too: only draftkit finds its rows in the target again"
        ),
    ] = False,
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py, for a DeepSeek-V4 module")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the drafter, or any model, that lies in --out")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Write a drafter in another form or for another engine. It may leave out the weights of its target.

    With --for it is written as that engine loads it (for llama.cpp as GGUF), or refused with the reason; the
    command that runs the pair is printed, with what holds for the engine's version."""
    check_engine(engine)
    if engine is None:
        if converter is not None:
            raise ConfigError("--converter: goes with --for llama.cpp")
        make_folder(out)
        check_drafter(drafter)
        if target:
            check_pair(target)
        with doing(LIBRARIES):
            from draftkit import stages

        lent = (target, borrow, borrow_rows)
        count = stages.run_export(drafter, out, form or "portable", dtype, *lent, overwrite=overwrite)
        typer.echo(as_json({"bytes": count}) if json_output else f"{count / 1e6:.1f} MB in {out}")
        return
    if form or borrow or borrow_rows:
        raise ConfigError("--for: the engine decides form and contents; leave out --form and --borrow")
    check_given("--converter", converter, "llama.cpp's convert_hf_to_gguf.py")
    if target is None:
        raise ConfigError("--for: needs the --target that the engine will serve")
    check_drafter(drafter)
    check_pair(target)
    check_kind(out, folder=engine != "llama.cpp" or out.suffix != ".gguf")
    with doing(LIBRARIES):
        from draftkit.handover.export import hand_over, print_handed_over

    made = hand_over(engine, drafter, out, target, dtype, overwrite, converter)
    typer.echo(as_json(asdict(made) | {"path": str(made.path)})) if json_output else print_handed_over(made)

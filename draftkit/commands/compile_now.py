"""`draftkit compile`: build the C++ functions now, before they are needed."""

from __future__ import annotations

import typer

EXAMPLE = "Example: draftkit compile"


def command() -> None:
    """Build the C++ functions now, before they are needed."""
    import time

    from draftkit.ops.native_build import NoNative, library_names, load_library

    for name in library_names():
        began = time.perf_counter()
        try:
            load_library(name)
            typer.echo(f"{name}: ready ({time.perf_counter() - began:.0f} s)")
        except NoNative as error:
            typer.echo(f"{name}: not compiled, PyTorch operations do the same slower: {error}")

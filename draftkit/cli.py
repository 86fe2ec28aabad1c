"""The command line: a table of commands. Each imports what it runs when it runs; `--help` imports neither
torch nor the recipes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from draftkit import __version__
from draftkit.commands import (
    bench,
    calibrate,
    capture,
    chat,
    compile_now,
    doctor,
    evaluate,
    export,
    features_verify,
    generate,
    mix,
    plan,
    profile,
    push,
    quickstart,
    recipes,
    report,
    serve,
    simulate,
    specialise,
    suite,
    traces,
    train,
    verify_lossless,
)
from draftkit.commands.usage import UsageError, told_in_one_line
from draftkit.commands.user_defaults import user_defaults
from draftkit.errors import DraftkitError, Interrupted
from draftkit.interrupt import raise_on_signals

app = typer.Typer(
    help="Train, measure and serve drafters that make an unchanged large model answer faster.",
    epilog="Begin with: draftkit quickstart --out runs/quickstart",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Each is a module of `draftkit/commands` with a function `command` and an EXAMPLE.
TABLE = {
    "quickstart": quickstart,
    "chat": chat,
    "recipes": recipes,
    "traces": traces,
    "mix": mix,
    "plan": plan,
    "generate": generate,
    "capture": capture,
    "train": train,
    "evaluate": evaluate,
    "suite": suite,
    "report": report,
    "specialise": specialise,
    "calibrate": calibrate,
    "profile": profile,
    "simulate": simulate,
    "verify-lossless": verify_lossless,
    "serve": serve,
    "bench": bench,
    "export": export,
    "doctor": doctor,
    "push": push,
    "compile": compile_now,
}
for _name, _module in TABLE.items():
    app.command(_name, epilog=_module.EXAMPLE)(_module.command)

features_app = typer.Typer(help="Look after feature stores.", no_args_is_help=True, rich_markup_mode=None)
features_app.command("verify", epilog=features_verify.EXAMPLE)(features_verify.command)
app.add_typer(features_app, name="features")

# Commands that keep what is finished when they are interrupted, and take it up when they are given again.
GOES_ON = {"quickstart", "specialise", "generate", "capture", "train", "evaluate", "calibrate"}


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """draftkit."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry point: mistakes end with one line and exit code 2, a disk that fails with 1, signals with 130 or
    143."""
    raise_on_signals()
    try:
        sys.exit(app(default_map=user_defaults(app), standalone_mode=False))
    except typer.Abort:  # a question that nobody answered
        sys.exit(1)
    except UsageError as error:
        typer.echo(told_in_one_line(error), err=True)
        sys.exit(2)
    except (DraftkitError, Interrupted, OSError) as error:
        goes_on = isinstance(error, Interrupted) and GOES_ON.intersection(sys.argv[1:2])
        hint = "; run the same command again to go on" if goes_on else ""
        typer.echo(f"error: {' '.join(str(error).split())}{hint}", err=True)
        sys.exit(1 if isinstance(error, OSError) else error.exit_code)


if __name__ == "__main__":
    main()

"""Train the embedded target again from this Python's library; continues where it was interrupted.

python -m tools.tiny_target --out runs/tiny --steps 1300 --publish draftkit/assets/tiny
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from draftkit.errors import DraftkitError, Interrupted
from draftkit.interrupt import raise_on_signals
from draftkit.output import make_folder
from tools.tiny_target.corpus import build_corpus
from tools.tiny_target.publish import publish
from tools.tiny_target.train import TinySettings, train_tiny_target


def main() -> None:
    """The command. A mistake is one line and exit code 2, a signal 130 or 143."""
    defaults = TinySettings()
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny_target",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help="optimizer steps (default %(default)s)"
    )
    parser.add_argument(
        "--rows", type=int, default=defaults.rows, help="rows of 512 tokens in a step (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    parser.add_argument("--publish", type=Path, help="also write the asset folder here")
    given = parser.parse_args()
    if min(given.steps, given.rows) < 1:
        parser.error("--steps and --rows must be 1 or more")
    raise_on_signals()
    try:
        make_folder(given.out)
        settings = TinySettings(steps=given.steps, rows=given.rows, seed=given.seed, compile=given.compile)
        result = train_tiny_target(given.out, settings, given.device)
        minutes = result.seconds / 60
        print(f"held-out loss: {result.held_out_loss}, {result.tokens_seen:,} tokens, {minutes:.1f} min")
        if given.publish:
            publish(given.out, build_corpus(), given.publish)
    except (DraftkitError, Interrupted) as error:
        hint = "; run the same command again to go on" if isinstance(error, Interrupted) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

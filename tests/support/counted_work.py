"""`python tests/support/counted_work.py NOTES ...`: the server of `fake_engine.py`, which notes in a file
what it reads and tokenises: a line for each text with whether the event loop waited for it, the function, and
its length."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from draftkit.serve import generate, stream
from draftkit.serve.detokenize import TokenTexts
from support.fake_engine import main


def count(owner: Any, name: str, size: Callable[..., int], notes: Path) -> None:
    """Note each call of a function."""
    function = getattr(owner, name)

    def counted(*given: Any) -> Any:
        where = "loop" if threading.current_thread() is threading.main_thread() else "beside"
        with notes.open("a") as file:
            file.write(f"{where} {name} {size(*given)}\n")
        return function(*given)

    setattr(owner, name, counted)


if __name__ == "__main__":
    into = Path(sys.argv.pop(1))
    count(stream, "_parsed", lambda raw, *_: len(raw), into)
    count(generate, "_prepared", lambda *_: 0, into)  # prompts, parameters and grammars of a request
    count(generate, "whole_body", lambda call, *_: sum(len(c.events) for c in call.choices), into)
    for name in ("encode", "spell", "decode"):
        count(TokenTexts, name, lambda texts, given, *_: len(given), into)
    main()

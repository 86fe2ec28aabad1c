"""`draftkit capture` in several processes: each works on a part before any of them has finished one,
however long it takes the others to come."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.patience import wait_until

SCRIPT = str(Path(__file__))


def meet(place: Path) -> None:
    """Wait until all processes are here."""
    place.mkdir(exist_ok=True)
    (place / os.environ["RANK"]).touch()
    wait_until(lambda: len(list(place.iterdir())) == int(os.environ["WORLD_SIZE"]), "all processes")


def wait_before_the_first_part() -> None:
    """From now on this process does."""
    from draftkit.features import capture

    one, met = capture._Work._one, list[int]()

    def together(self: Any, held: Any) -> None:
        if not met:
            met.append(1)
            folder = self.writer.folder
            meet(folder.with_name(folder.name + "-met"))
        one(self, held)

    capture._Work._one = together  # type: ignore[method-assign]


if __name__ == "__main__":
    from draftkit.cli import main

    wait_before_the_first_part()
    main()

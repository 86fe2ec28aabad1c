"""Table 1 of the paper (arXiv 2607.05147): accepted length at temperature 1, blocks of 7, non-thinking; and
our own beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from draftkit.evaluate.run import EvalResult
from draftkit.evaluate.suites import PAPER

if TYPE_CHECKING:
    from rich.console import Console

SETS = tuple(one.name for one in PAPER)  # the table's order
_ROWS: dict[str, dict[str, tuple[float, ...]]] = {
    "Qwen3-4B": {
        "eagle3": (5.14, 4.62, 3.92, 3.69, 4.16, 3.77, 2.39, 2.26, 2.55),
        "dflash": (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
        "dspark": (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
    },
    "Qwen3-8B": {
        "eagle3": (5.30, 4.77, 3.91, 3.96, 4.33, 4.17, 2.66, 2.54, 2.54),
        "dflash": (5.33, 4.91, 4.07, 4.36, 4.64, 4.39, 3.11, 2.98, 2.81),
        "dspark": (6.17, 5.78, 5.01, 5.16, 5.52, 5.17, 3.72, 3.58, 3.21),
    },
    "Qwen3-14B": {
        "eagle3": (5.24, 4.60, 3.71, 3.81, 4.14, 4.01, 2.62, 2.47, 2.48),
        "dflash": (5.41, 4.84, 3.98, 4.44, 4.59, 4.33, 3.10, 2.94, 2.72),
        "dspark": (6.21, 5.74, 4.94, 5.26, 5.43, 5.02, 3.70, 3.58, 3.13),
    },
    "Gemma4-12B": {
        "eagle3": (5.87, 5.46, 4.83, 4.72, 5.37, 4.16, 3.19, 3.06, 2.72),
        "dflash": (5.45, 5.04, 4.22, 4.39, 4.95, 3.70, 2.98, 2.84, 2.59),
        "dspark": (6.05, 5.78, 5.12, 5.11, 5.64, 4.51, 3.49, 3.35, 2.92),
    },
}


def paper_lengths(target: str, algorithm: str) -> tuple[str, Mapping[str, float]]:
    """The paper's target that is nearest by name (Qwen3-4B for one that it does not have), and its lengths by
    set."""
    plain = target.lower().replace("-", "").replace("_", "")
    found = next((name for name in _ROWS if name.lower().replace("-", "") in plain), "Qwen3-4B")
    return found, dict(zip(SETS, _ROWS[found][algorithm], strict=True))


def print_beside_paper(result: EvalResult, algorithm: str, console: Console | None = None) -> None:
    """Our lengths with intervals, the paper's, and the difference where the target is the same."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    name, paper = paper_lengths(str(result.settings["target"]), algorithm)
    target = str(result.settings["target"])
    same = name.lower().replace("-", "") in target.lower().replace("-", "")
    temperature = result.settings["sampling"]["temperature"]
    about = f"{target}, T = {temperature:g}; the paper's {algorithm} on {name}, T = 1"
    table = Table(title=about, box=box.SIMPLE_HEAD, padding=0)
    for column in ("set", "answers", "length", "95 %", "paper", "difference"):
        table.add_column(column, justify="left" if column == "set" else "right", no_wrap=True)
    counts = {one: sum(r.domain == one for r in result.records) for one in SETS}
    for one in SETS:
        own = result.accepted_len.get(one)
        if own is None:
            table.add_row(one, "-", "-", "-", f"{paper[one]:.2f}", "-")
            continue
        comparable = same and temperature == 1
        difference = f"{own.value - paper[one]:+.2f}" if comparable else "-"
        interval = f"{own.low:.2f}–{own.high:.2f}"
        table.add_row(one, str(counts[one]), f"{own.value:.2f}", interval, f"{paper[one]:.2f}", difference)
    macro, theirs = result.accepted_len["macro"], sum(paper.values()) / len(paper)
    whole = len(result.accepted_len) == len(SETS) + 1
    table.add_section()
    table.add_row(
        "macro" if whole else "macro of those",
        str(len(result.records)),
        f"{macro.value:.2f}",
        f"{macro.low:.2f}–{macro.high:.2f}",
        f"{theirs:.2f}",
        f"{macro.value - theirs:+.2f}" if same and whole and temperature == 1 else "-",
    )
    console = console or Console(highlight=False)
    console.print(table)
    if not same:
        console.print(f"{target} is none of the paper's targets: these lengths differ by the target, too")

"""The terminal table of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from draftkit.evaluate.run import EvalResult, Speed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_report(results: Sequence[EvalResult], console: Console | None = None) -> None:
    """One table per result, then the speed. It fits 80 columns with up to 15 drafted tokens."""
    from rich.console import Console

    console = console or Console()
    for result in results:
        console.print(_table(result))
        if result.speed:
            console.print(_speed(result.speed) + "\n", highlight=False)


def _speed(speeds: Mapping[str, Speed]) -> str:
    *of_domains, macro = speeds.values()
    each = ", ".join(f"{name} {speed.ratio:.2f}" for name, speed in zip(speeds, of_domains, strict=False))
    quartiles = f"quartiles {macro.low_quartile:.2f} to {macro.high_quartile:.2f}, "
    if macro.prompts == len(of_domains):  # one prompt of each domain has no spread
        quartiles = ""
    return f"speed: {macro.ratio:.2f} x plain decoding ({quartiles}{macro.prompts} prompts, same loop, same run): {each}"


def _table(result: EvalResult) -> Table:
    """Accepted length with its interval, and conditional acceptance by position in percent ("-": never reached)."""
    from rich import box
    from rich.table import Table

    temperature = result.settings["sampling"]["temperature"]
    title = f"{result.settings['target']}, T = {temperature:g}, {result.settings['prompts']} prompts"
    caption = "length: accepted length; a1, a2, ...: acceptance by position in %"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("domain", overflow="fold")
    for column in ("length", "95 %"):
        table.add_column(column, no_wrap=True)
    for position in range(1, len(result.acceptance["all"]) + 1):
        table.add_column(f"a{position}", justify="right", no_wrap=True)
    for name, interval in result.accepted_len.items():
        positions = result.acceptance["all" if name == "macro" else name]
        if name == "macro":
            table.add_section()
        cells = [f"{100 * p:.0f}" if p == p else "-" for p in positions]
        table.add_row(name, f"{interval.value:.2f}", f"{interval.low:.2f}–{interval.high:.2f}", *cells)
    return table

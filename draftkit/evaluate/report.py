"""The terminal table of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from draftkit.evaluate.run import EvalResult
from draftkit.evaluate.speed import Speed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_report(results: Sequence[EvalResult], console: Console | None = None) -> None:
    """One table per result, then the speed. It fits 80 columns with up to 15 drafted tokens."""
    from rich.console import Console

    console = console or Console(highlight=False)
    for result in results:
        console.print(_table(result))
        for kind, lengths in result.by_place.items():
            told = ", ".join(f"{place}: {length:.2f}" for place, length in lengths.items())
            console.print(f"accepted length by tokens of {kind}: {told}")
        if result.speed:
            console.print(speed_line(result.speed))
            console.print(verdict(result) + "\n")


def speed_line(speeds: Mapping[str, Speed]) -> str:
    """The ratio of all prompts with its interval, then each domain's."""
    of_all = speeds["all"]
    each = ", ".join(
        f"{name} {s.ratio:.2f} ({s.low:.2f} to {s.high:.2f})" for name, s in speeds.items() if name != "all"
    )
    baseline = f"the engine without a drafter, {of_all.prompts} prompts one at a time"
    return f"speed: {of_all.ratio:.2f} x (95 % {of_all.low:.2f} to {of_all.high:.2f}) of {baseline}: {each}"


def verdict(result: EvalResult) -> str:
    """What was found, in plain words. Empty where no speed was measured."""
    if "all" not in result.speed:
        return ""
    speed, length = result.speed["all"], result.accepted_len["macro"].value
    temperature = result.settings["sampling"]["temperature"]
    if speed.low > 1:
        found = "drafting pays here"
    elif speed.high < 1:
        found = "drafting costs more than it gains here"
    else:
        found = "no difference can be told here"
    return (
        f"Temperature {temperature:g}: a round of drafting yields {length:.2f} tokens, the target alone "
        f"1. The engine makes "
        f"{speed.drafted_tokens_per_second:,.0f} tokens per second with the drafter and "
        f"{speed.plain_tokens_per_second:,.0f} "
        f"without, {speed.ratio:.2f} x: {found}. It drafted in {100 * speed.drafting:.0f} % of its steps, "
        f"where it "
        "expected to gain."
    )


def _table(result: EvalResult) -> Table:
    """Accepted length with its interval, and conditional acceptance by position in percent ("-": never
    reached)."""
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

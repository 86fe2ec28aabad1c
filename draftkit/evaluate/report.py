"""The terminal table of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from draftkit.evaluate.run import EvalResult


def print_report(results: Sequence[EvalResult]) -> None:
    """One table per result: accepted length with interval and acceptance by position, then the speed."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for result in results:
        temperature = result.settings["sampling"]["temperature"]
        title = f"{result.settings['target']}, T = {temperature:g}, {result.settings['prompts']} prompts"
        table = Table(title=title)
        gamma = len(result.acceptance["all"])
        for column in ("domain", "accepted length", "95 %"):
            table.add_column(column, no_wrap=True)
        for position in range(1, gamma + 1):
            table.add_column(f"a{position}", justify="right")
        for name, interval in result.accepted_len.items():
            positions = result.acceptance["all" if name == "macro" else name]
            if name == "macro":
                table.add_section()
            cells = [f"{p:.2f}" if p == p else "-" for p in positions]
            table.add_row(name, f"{interval.value:.2f}", f"{interval.low:.2f} to {interval.high:.2f}", *cells)
        console.print(table)
        speed = result.speed
        if speed:
            console.print(
                f"speed: {speed.ratio:.2f} x plain decoding (quartiles {speed.low_quartile:.2f} to "
                f"{speed.high_quartile:.2f}, {speed.prompts} prompts, same loop, same run)\n"
            )

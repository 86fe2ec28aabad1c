"""What `draftkit bench` shows of its measurements: a table, and a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from draftkit.output import save_figure

_COLUMNS = (
    "users",
    "server",
    "tok/s",
    "tok/s/user",
    "95 %",
    "TTFT p50",
    "p99",
    "per token",
    "e2e p50",
    "accepted",
    "drafted",
    "failed",
)


def print_bench(results: dict[str, Any]) -> None:
    """A table: one row per server and level, ratios below each pair, and notes on what is to be known to read
    it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_title(results["settings"]))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "server" else "right", no_wrap=True)
    for run in results["runs"]:
        for server in run["servers"]:
            table.add_row(str(run["concurrency"]), server["label"], *_cells(server))
        if "ratios" in run:
            ratio = run["ratios"]
            table.add_row(
                "",
                "first / second",
                f"{_shown(ratio['tokens_per_s'], 1, 2)} x",
                f"{_shown(ratio['tokens_per_s_per_user'], 1, 2)} x",
                _range(run["ratio_per_user_95"], 2),
            )
    console = Console(highlight=False)
    console.width = max(console.width, 140)  # a pipe is 80 wide, which cuts numbers
    console.print(table)
    for note in notes(results):
        console.print(note)


def _title(settings: dict[str, Any]) -> str:
    length = f"{settings['max_tokens']} new tokens per request"
    if settings["ignore_eos"]:
        length += " (an answer that would end earlier goes on: ignore_eos)"
    else:
        length = f"at most {length}"
    arrivals = "" if settings["rate"] is None else f"; {settings['rate']:g} arrivals per second"
    return f"{length}{arrivals}; latencies in ms"


def _cells(server: dict[str, Any]) -> list[str]:
    share = server["drafted_share"]
    return [
        _shown(server["tokens_per_s"]),
        _shown(server["tokens_per_s_per_user"]),
        _range(server["tokens_per_s_per_user_95"], 1),
        _shown(server["ttft"]["p50"], 1000),
        _shown(server["ttft"]["p99"], 1000),
        _shown(server["inter_token"]["mean"], 1000, 2),
        _shown(server["e2e"]["p50"], 1000),
        _shown(server["accepted_len"], 1, 2),
        "–" if share is None else f"{100 * share:.0f} %",
        str(server["failed"]),
    ]


def notes(results: dict[str, Any]) -> list[str]:
    """Sentences below the table: where tokens are not what was counted, where the drafter rested, where
    nothing can be told apart."""
    servers = [(run["concurrency"], s) for run in results["runs"] for s in run["servers"]]
    guessed = {s["url"]: 0 for _, s in servers if s["tokens_counted_by"] == "chunks"}
    found = [f"no usage from {' and '.join(guessed)}: chunks are counted as tokens"] if guessed else []
    for users, s in servers:
        share = s["drafted_share"]
        if share is not None and share < 0.5 and s["label"] != "drafts off":
            found.append(
                f"{s['label']}, {_users(users)}: drafted in {100 * share:.0f} % of rounds. In the others the "
                "drafter rested, because the server measured the target alone to be faster at this load."
            )
    for run in results["runs"]:
        interval = run.get("ratio_per_user_95")
        if interval and interval[0] <= 1 <= interval[1]:
            told = "no difference can be told (the interval holds 1)."
            found.append(f"{_users(run['concurrency'])}: {told}")
    return found


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"


def _shown(value: float | None, scale: float = 1, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value * scale:,.{digits}f}"


def _range(interval: tuple[float, float] | None, digits: int) -> str:
    return "–" if interval is None else "–".join(f"{value:,.{digits}f}" for value in interval)


def plot_bench(results: dict[str, Any], path: Path) -> None:
    """Speed of one user (median, 95 % interval) and of all together over the number of users, one line per
    server; both axes begin at zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = [run["concurrency"] for run in results["runs"]]
    for place in range(len(results["runs"][0]["servers"])):
        rows = [
            (i, run["servers"][place])
            for i, run in enumerate(results["runs"])
            if place < len(run["servers"]) and run["servers"][place]["tokens_per_s_per_user"]
        ]
        if not rows:
            continue
        # beside one another, so that none covers another
        at, medians = [i + 0.06 * place for i, _ in rows], [s["tokens_per_s_per_user"] for _, s in rows]
        intervals = [s["tokens_per_s_per_user_95"] or (m, m) for m, (_, s) in zip(medians, rows, strict=True)]
        off = [
            [max(0.0, m - low) for m, (low, _) in zip(medians, intervals, strict=True)],
            [max(0.0, high - m) for m, (_, high) in zip(medians, intervals, strict=True)],
        ]
        left.errorbar(at, medians, yerr=off, marker="o", capsize=3, label=rows[0][1]["label"])
        right.plot(at, [s["tokens_per_s"] for _, s in rows], marker="o", label=rows[0][1]["label"])
    rate = results["settings"]["rate"]
    users = "users at once" if rate is None else f"at most so many at once, {rate:g} arrivals/s"
    left.set(xlabel=users, ylabel="tokens/s of one user", title="one user (median, 95 %)")
    right.set(xlabel=users, ylabel="tokens/s of all users", title="all users together")
    for axes in (left, right):
        axes.set_xticks(range(len(levels)), [str(level) for level in levels])
        axes.set_xlim(-0.5, len(levels) - 0.5)
        axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1e-9))
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save_figure(figure, path)

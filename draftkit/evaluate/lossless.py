"""`draftkit verify-lossless`: the proof of `exactness` over rules, planners, block sizes and one or two
requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from draftkit.errors import ScheduleError
from draftkit.evaluate.exactness import DEVIATION_ALLOWED, Finding, output_distribution, prove
from draftkit.evaluate.exactness_cases import appendix_a, same_step_search
from draftkit.ops.verify import TOKEN_RULE


def run_lossless(vocab: int, gammas: Sequence[int], tables: int) -> list[Finding]:
    """All findings, with a progress bar on standard error. Raises ScheduleError for a block size that is too
    large."""
    from rich.console import Console
    from rich.progress import Progress

    wrong = [g for g in gammas if not 1 <= g <= 3]
    if wrong:
        raise ScheduleError(f"gamma {wrong[0]}: enumeration is possible for 1 to 3 drafted tokens")
    findings = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("enumerate", total=2 * len(gammas) * tables)
        for requests in (1, 2):
            for gamma in gammas:
                findings += prove(requests, gamma, tables, vocab, tick=lambda: bar.update(task, advance=1))
    return findings


def print_lossless(findings: Sequence[Finding], tables: int, vocab: int, as_json: bool) -> bool:
    """Print the table and say whether all is as it must be: distributions kept, and the control found out."""
    worst = max(f.deviation for f in findings)
    example, step_rate = appendix_a()
    control = output_distribution(TOKEN_RULE, same_step_search(step_rate), [example], rounds=1)[0]
    found_out = abs(control - 0.85) < DEVIATION_ALLOWED
    if as_json:
        report = {"vocab": vocab, "tables": tables, "findings": [asdict(f) for f in findings]}
        print(
            json.dumps(
                report | {"largest_deviation": worst, "same_step_search_gives": control, "target": 0.7}
            )
        )
    else:
        _print_table(findings, tables, vocab)
        print(f"largest deviation {worst:.1e}, allowed {DEVIATION_ALLOWED:.0e}")
        print(
            f"control, a planner that must fail: the same-step search of Appendix A outputs A with "
            f"{control:.4f}, not 0.7"
        )
    return worst < DEVIATION_ALLOWED and found_out


def _print_table(findings: Sequence[Finding], tables: int, vocab: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"deviation from the target's distribution, at most ({tables} tables per cell, V = {vocab})"
    )
    columns = list(dict.fromkeys((f.requests, f.gamma, f.rounds) for f in findings))
    for name in ("rule", "planner"):
        table.add_column(name, no_wrap=True)
    for requests, gamma, rounds in columns:
        table.add_column(
            f"{requests} request{'s'[: requests - 1]}\ngamma {gamma}\n{rounds} rounds", justify="right"
        )
    for rule, planner in dict.fromkeys((f.rule, f.planner) for f in findings):
        own = {
            (f.requests, f.gamma, f.rounds): f.deviation
            for f in findings
            if (f.rule, f.planner) == (rule, planner)
        }
        table.add_row(rule, planner, *(f"{own[c]:.1e}" for c in columns))
    Console().print(table)

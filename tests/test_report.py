"""The table of an evaluation fits a terminal of 80 columns and loses no number."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from draftkit.evaluate.metrics import Interval
from draftkit.evaluate.report import print_report
from draftkit.evaluate.run import EvalResult
from draftkit.evaluate.speed import Speed


def rendered(gamma: int, domains: tuple[str, ...], middle: float = 2.5) -> list[str]:
    settings = {"sampling": {"temperature": 1.0}, "target": "tiny", "prompts": 60}
    lengths = {
        name: Interval(3.21 + i, 2.1 + i, 14.55 + i) for i, name in enumerate((*domains, "all", "macro"))
    }
    acceptance = {name: [1.0 - 0.05 * place for place in range(gamma)] for name in (*domains, "all")}
    acceptance[domains[0]][-1] = float("nan")
    written = io.StringIO()
    speeds = {name: Speed(10, 2.0 + i, 1.5, 3.5, 100, 250, 0.9) for i, name in enumerate(domains)}
    speeds |= {"all": Speed(30, middle, middle - 0.25, middle + 0.25, 100, 100 * middle, 0.9)}
    result = EvalResult({}, settings, lengths, acceptance, speeds, ())
    print_report([result], Console(file=written, width=80))
    return written.getvalue().splitlines()


@pytest.mark.parametrize("gamma", [1, 7, 15])
@pytest.mark.parametrize("domains", [("math", "code", "chat"), ("multi-turn-conversations-of-a-benchmark",)])
def test_the_table_fits_80_columns_with_every_number(gamma: int, domains: tuple[str, ...]) -> None:
    lines = rendered(gamma, domains)
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    places = [f"{100 - 5 * place}" for place in range(gamma)]
    rows = [line.split() for line in lines if "–" in line]
    assert [row[-gamma:] for row in rows] == [[*places[:-1], "-"], *[places] * (len(domains) + 1)]
    assert [row[-gamma - 2 : -gamma] for row in rows] == [
        [f"{3.21 + i:.2f}", f"{2.1 + i:.2f}–{14.55 + i:.2f}"] for i in range(len(domains) + 2)
    ]
    [heading] = [line.split() for line in lines if "domain" in line]
    assert heading == ["domain", "length", "95", "%", *(f"a{place + 1}" for place in range(gamma))]


@pytest.mark.parametrize(
    ("middle", "found"),
    [
        (2.5, "drafting pays here"),
        (1.1, "no difference can be told here"),
        (0.5, "drafting costs more than it gains here"),
    ],
)
def test_the_speed_names_its_baseline_and_says_in_words_what_was_found(middle: float, found: str) -> None:
    text = " ".join(" ".join(rendered(7, ("math", "code"), middle)).split())
    interval = f"(95 % {middle - 0.25:.2f} to {middle + 0.25:.2f})"
    assert (
        f"speed: {middle:.2f} x {interval} of the engine without a drafter, 30 prompts one at a time: "
        f"math 2.00" in text
    )
    speeds = f"{100 * middle:.0f} tokens per second with the drafter and 100 without, {middle:.2f} x"
    assert f"{speeds}: {found}. It drafted in 90 % of its steps" in text

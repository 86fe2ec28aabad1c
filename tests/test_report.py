"""The table of an evaluation fits a terminal of 80 columns and loses no number."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from draftkit.evaluate.metrics import Interval
from draftkit.evaluate.report import print_report
from draftkit.evaluate.run import EvalResult, Speed


def rendered(gamma: int, domains: tuple[str, ...], timed: int = 15) -> list[str]:
    settings = {"sampling": {"temperature": 1.0}, "target": "tiny", "prompts": 60}
    lengths = {name: Interval(3.21 + i, 2.1 + i, 14.55 + i) for i, name in enumerate((*domains, "all", "macro"))}
    acceptance = {name: [1.0 - 0.05 * place for place in range(gamma)] for name in (*domains, "all")}
    acceptance[domains[0]][-1] = float("nan")
    written = io.StringIO()
    speeds = {name: Speed(5, 2.0 + i, 1.5, 3.5) for i, name in enumerate(domains)} | {"macro": Speed(timed, 2.5, 2.25, 2.75)}
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


def test_the_speed_names_its_baseline() -> None:
    text = " ".join(" ".join(rendered(7, ("math", "code"))).split())
    told = "speed: 2.50 x plain decoding (quartiles 2.25 to 2.75, 15 prompts, same loop, same run): math 2.00, code 3.00"
    assert told in text


def test_one_prompt_of_each_domain_has_no_quartiles() -> None:
    text = " ".join(" ".join(rendered(7, ("math", "code"), timed=2)).split())
    assert "speed: 2.50 x plain decoding (2 prompts, same loop, same run): math 2.00, code 3.00" in text

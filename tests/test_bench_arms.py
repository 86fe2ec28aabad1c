"""`draftkit bench` on one server with drafts and without, and what it says below its table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftkit.commands.numbers import whole_numbers
from draftkit.serve.bench import ratio_interval, ratios, summarise
from draftkit.serve.bench_report import notes
from draftkit.serve.load import Record
from support.server import Server, serving


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "draftkit", "bench", "--warmup", "0", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def fast() -> Iterator[Server]:
    with serving("--step-seconds", "0.005") as running:
        yield running


@pytest.mark.slow
def test_one_server_with_drafts_and_without(fast: Server, tmp_path: Path) -> None:
    """The stand-in makes three tokens per step with drafts and one without. How fast that was depends on the
    machine; what is made of such times is tested below."""
    done = bench(
        "--url",
        fast.url,
        "--compare-drafts",
        "--concurrency",
        "1,2",
        "--requests",
        "4",
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "bench.json").read_text("utf-8"))["runs"]
    assert [run["concurrency"] for run in runs] == [1, 2]
    for run in runs:
        on, off = run["servers"]
        assert [on["label"], off["label"]] == ["drafts on", "drafts off"] and on["url"] == off["url"]
        assert 2.9 < on["accepted_len"] <= 3.0, "the last round of an answer is shorter"
        assert on["drafted_share"] == 1.0 and off["accepted_len"] is None
        low, high = run["ratio_per_user_95"]
        assert 0 < low <= run["ratios"]["tokens_per_s_per_user"] <= high
    assert "ignore_eos" in done.stdout and "rested" not in done.stdout
    assert "95 %" in done.stdout and "drafts off" in done.stdout


def test_a_ratio_and_its_interval_are_those_of_the_speeds_of_requests() -> None:
    """Thirty tokens in 0.1 s with drafts, and in 0.3 s but for one of four without."""

    def arm(*seconds: float) -> dict[str, Any]:
        records = [Record(sent=5.0, first=5.01, done=5.0 + s, output_tokens=30) for s in seconds]
        return summarise(records, 1.0, {})

    on, off = arm(0.1, 0.1, 0.1, 0.1), arm(0.3, 0.3, 0.3, 0.6)
    assert on["request_speeds"] == pytest.approx([300.0] * 4)
    assert off["request_speeds"] == pytest.approx([100.0, 100.0, 100.0, 50.0])
    assert ratios([on, off])["tokens_per_s_per_user"] == pytest.approx(3.0)
    assert ratio_interval(on["request_speeds"], off["request_speeds"]) == pytest.approx((3.0, 6.0), rel=0.05)
    assert ratio_interval(on["request_speeds"], off["request_speeds"][:1]) is None


def test_answers_may_end_by_themselves(fast: Server) -> None:
    done = bench("--url", fast.url, "--no-ignore-eos", "--max-tokens", "400", "--requests", "1", "--json")
    [run] = json.loads(done.stdout)["runs"]
    assert run["servers"][0]["output_tokens"] < 400, "the stand-in's text is shorter"


def test_notes_say_when_the_drafter_rested_and_when_nothing_can_be_told() -> None:
    def server(label: str, share: float | None) -> dict[str, Any]:
        return {"label": label, "url": "u", "tokens_counted_by": "usage", "drafted_share": share}

    run = {"concurrency": 8, "servers": [server("drafts on", 0.02), server("drafts off", 0.0)]}
    told = notes({"runs": [{**run, "ratio_per_user_95": (0.9, 1.1)}]})
    assert len(told) == 2 and told[0].startswith("drafts on, 8 users: drafted in 2 % of rounds")
    assert "no difference can be told" in told[1]
    assert notes({"runs": [{**run, "servers": [server("x", 1.0)], "ratio_per_user_95": (1.2, 1.4)}]}) == []


def test_levels_are_whole_numbers_with_commas_or_repeated(fast: Server) -> None:
    assert whole_numbers("--concurrency", ["1,8", "64"]) == [1, 8, 64] and whole_numbers("-c", None) == []
    done = bench("--url", fast.url, "--concurrency", "1,x")
    assert (
        done.returncode == 2
        and done.stderr == "error: --concurrency 'x': give whole numbers, 1 or more, as 1,8,64\n"
    )

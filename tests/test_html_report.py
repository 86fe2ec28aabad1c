"""The report of a run: one file, whole in a real browser, honest about what a run that was cut off has not
got."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from draftkit import cli
from draftkit.errors import ConfigError, DataError
from draftkit.evaluate.html_report import Span, reliability_of, spans, write_report
from draftkit.evaluate.metrics import Interval, PromptRecord
from draftkit.evaluate.run import EvalResult
from draftkit.evaluate.speed import Speed
from draftkit.schedule.traces import save_traces
from support.browser import browsing, needs_browser
from support.traces import made_traces

RECORD = PromptRecord(
    "p<1>", "math", 7, "stop", 3, 6, (3, 1), (2, 0), (2, 0, 1), 20, (70, 71, 72, 73, 74, 75, 76), "text"
)


def run_folder(folder: Path, whole: bool = True) -> Path:
    """What stages leave: an evaluation, and, of a whole run, the drafter's note, traces and a load test."""
    settings = {"sampling": {"temperature": 0.0}, "target": "tiny", "prompts": 1, "skipped": {"math": 2}}
    lengths = {"math": Interval(2.0, 1.5, 2.5), "macro": Interval(2.0, 1.5, 2.5)}
    speed = {"all": Speed(3, 1.4, 1.2, 1.6, 100, 140, 0.9)}
    places = {"answer": {"0-31": 2.0}, "context": {"0-255": 2.0}}
    acceptance = {"math": [0.9, 0.5], "all": [0.9, float("nan")]}
    result = EvalResult({"draftkit": "x"}, settings, lengths, acceptance, speed, (RECORD,), places)
    (folder / "results").mkdir(parents=True)
    result.save(folder / "results" / "evaluate-T0.json")
    if whole:
        (folder / "drafter" / "best").mkdir(parents=True)
        note = {
            "target": "tiny",
            "algorithm": "dspark",
            "validation": {"math": 3.9},
            "recipe": {"train": {"lr": 0.1}},
        }
        (folder / "drafter" / "best" / "draftkit.json").write_text(json.dumps(note))
        save_traces(made_traces(), folder / "traces.safetensors")
        server = {"url": "http://a", "tokens_per_s": 50.0, "tokens_per_s_per_user": None, "accepted_len": 2.5}
        (folder / "bench.json").write_text(json.dumps({"runs": [{"concurrency": 4, "servers": [server]}]}))
    return folder


def test_tokens_are_coloured_by_who_wrote_them() -> None:
    """Accepted 2 of 2; then none; then 1 of 2."""
    assert spans(RECORD, list("abcdefg"), 2) == [
        Span("target", "a"),
        Span("accepted", "bc"),
        Span("target", "d"),
        Span("rejected", "2"),
        Span("target", "e"),
        Span("accepted", "f"),
        Span("rejected", "1"),
        Span("target", "g"),
    ]
    cut = spans(RECORD, list("abc"), 2)  # an answer that is shown in part
    assert "".join(s.text for s in cut if s.kind != "rejected") == "abc"


def test_reliability_is_the_diagonal_where_confidences_are_true() -> None:
    for confidence, accepted in reliability_of(made_traces(prompts=200, rows=60)):
        assert abs(confidence - accepted) < 0.06


def test_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    found = write_report(run_folder(tmp_path / "run"), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert found.missing == ()
    assert not re.search(r"https?://(?!a\b)|<script|<link|@import|src=", text)
    assert "p&lt;1&gt;" in text and "p<1>" not in text  # names of prompts are text
    for word in ("2.00", "1.40 x", "drafting pays here", "validation", "http://a", "Reliability"):
        assert word in text, word


def test_a_run_that_was_cut_off_shows_what_there_is(tmp_path: Path) -> None:
    found = write_report(run_folder(tmp_path / "run", whole=False), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "the drafter's provenance (draftkit train)" in found.missing
    assert 'id="missing"' in text and 'id="trained"' not in text and 'id="loads"' not in text


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has neither evaluate-T"):
        write_report(tmp_path, tmp_path / "report.html")
    run = run_folder(tmp_path / "run")
    (run / "bench.json").write_text("{")
    with pytest.raises(DataError, match=r"bench\.json: is damaged"):
        write_report(run, tmp_path / "report.html")
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path / "nowhere")])
    assert isinstance(done.exception, ConfigError)


@needs_browser
def test_a_browser_shows_it_light_and_dark_without_a_complaint(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    done = CliRunner().invoke(cli.app, ["report", str(run)])
    assert done.exit_code == 0, done.output
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=(run / "report.html").as_uri())
        page.wait("document.readyState === 'complete' && document.querySelector('svg')")
        colours = set()
        for scheme in ("light", "dark"):
            page.call(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
            )
            colours.add(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2
        words = page.run("document.body.innerText")
        assert "Accepted length, with 95 % intervals" in words and "Too long, skipped: 2" in words
        assert page.run("document.querySelectorAll('svg').length") == 3
        sizes = page.run("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)")
        assert min(sizes) > 20
        assert page.run("document.querySelectorAll('.answer .accepted').length") == 2
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.call("Emulation.setEmulatedMedia", media="print", features=dark)
        paper = page.run("getComputedStyle(document.querySelector('.answer .accepted')).backgroundColor")
        assert paper == "rgb(205, 236, 205)", "paper is light whatever the screen is"
        assert page.run("document.querySelector('#settings').checkVisibility()")
        assert len(page.call("Page.printToPDF", printBackground=True)["data"]) > 10_000
        assert page.console == []

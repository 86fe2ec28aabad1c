"""What the page at / shows a newcomer: a comparison, questions to begin with, a drafter that rests, a server
that is gone, and all of it on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import Page, browsing, needs_browser
from support.server import TEXT, Server, serving

DONE = "document.querySelectorAll('.assistant[data-done]').length"
IDLE = "document.getElementById('send').textContent === 'send'"
READY = "document.getElementById('model')?.textContent.includes('fake')"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--step-seconds", "0.005") as running:
        yield running


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.run(f"[...document.querySelectorAll('{selector}')].map((e) => e.textContent)")
    return found


def sent(page: Page) -> list[dict[str, Any]]:
    return [json.loads(body) for body in page.run("sent")]


def opened(page: Page, url: str) -> None:
    page.call("Page.navigate", url=url + "/")
    page.wait(READY)
    page.run(
        "var sent = [], real = window.fetch; window.fetch = (url, options) => "
        "{ if (options?.body) sent.push(options.body); return real(url, options); }"
    )


@pytest.mark.slow
@needs_browser
def test_compare_asks_twice_with_the_same_context_and_shows_both_side_by_side(
    server: Server, tmp_path: Path
) -> None:
    with browsing(tmp_path / "profile") as page:
        opened(page, server.url)
        page.press_enter("first")
        page.wait(f"{DONE} === 1")
        page.set("prompt", "second")
        page.click("compare")
        page.wait(f"document.querySelector('.verdict') && {IDLE}")
        bodies = sent(page)
        assert [body["draft"] for body in bodies] == [True, True, False]
        assert bodies[1]["messages"] == bodies[2]["messages"] and len(bodies[1]["messages"]) == 3
        words = ".pair .turn span.accepted, .pair .turn span.target"
        assert "".join(texts(page, words)) == 2 * TEXT
        lefts = page.run(
            "[...document.querySelectorAll('.pair .turn')].map((e) => e.getBoundingClientRect().x)"
        )
        assert lefts[1] - lefts[0] > 200, "beside one another"
        [verdict] = texts(page, ".verdict")
        assert verdict.startswith("The two texts are the same, letter by letter. With drafts: 2.9")
        assert texts(page, "#ratio")[0].startswith("2.9")
        page.click("compare")
        page.wait(f"document.querySelectorAll('.verdict').length === 2 && {IDLE}")
        assert sent(page)[-1]["messages"] == bodies[1]["messages"], "nothing typed: the last question again"
        assert not page.console


@needs_browser
def test_an_example_is_asked_by_a_click_and_examples_come_back_with_a_new_conversation(
    server: Server, tmp_path: Path
) -> None:
    visible = "getComputedStyle(document.getElementById('examples')).display !== 'none'"
    with browsing(tmp_path / "profile") as page:
        opened(page, server.url)
        assert page.run(visible)
        page.run("document.querySelector('#examples button').click()")
        page.wait(f"{DONE} === 1")
        assert sent(page)[0]["messages"][0]["content"] == texts(page, "#examples button")[0]
        assert not page.run(visible)
        page.click("clear")
        assert page.run(visible)


@needs_browser
def test_a_drafter_that_rests_is_told_with_both_speeds(server: Server, tmp_path: Path) -> None:
    lines = (
        'draftkit:spec_decode_drafting{model_name="fake"} 0\\n'
        'draftkit:spec_decode_tokens_per_second{drafts="on",model_name="fake"} 80.4\\n'
        'draftkit:spec_decode_tokens_per_second{drafts="off",model_name="fake"} 100.2\\n'
    )
    with browsing(tmp_path / "profile") as page:
        opened(page, server.url)
        assert texts(page, "#resting") == [""]
        page.run(f"window.fetch = async () => new Response(`{lines}`); 0")
        page.wait("document.getElementById('resting').textContent.includes('drafter rests')")
        assert "alone was measured at 100 tokens/s, with drafts at 80." in texts(page, "#resting")[0]


@pytest.mark.slow
@needs_browser
def test_a_server_that_is_gone_is_told_and_forgotten_when_it_is_back(tmp_path: Path) -> None:
    hidden = "document.getElementById('state').hidden"
    with browsing(tmp_path / "profile") as page:
        with serving() as first:
            opened(page, first.url)
            assert page.run(hidden)
        page.wait(f"!{hidden}")
        assert "does not answer" in texts(page, "#state")[0]
        page.press_enter("hello")
        page.wait("document.querySelector('.error')?.textContent.includes('is it still running?')")
        with serving("--port", first.url.rsplit(":", 1)[1]):
            page.wait(hidden)


@needs_browser
def test_signs_stand_for_what_would_break_the_line_of_rejected_drafts(server: Server, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as page:
        opened(page, server.url)
        shown = page.run("['\\n\\n', ' ', '', '\\t', 'a b', '<|im_end|>'].map(shown)")
        assert shown == ["↵↵", "␣", "∅", "⇥", "a b", "<|im_end|>"]


@needs_browser
def test_on_a_phone_the_conversation_has_the_height_and_nothing_runs_over_the_edge(
    server: Server, tmp_path: Path
) -> None:
    with browsing(tmp_path / "profile") as page:
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        opened(page, server.url)
        page.press_enter("hello")
        page.wait(f"{DONE} === 1")
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.run("document.getElementById('talk').clientHeight") > 0.55 * 844
        assert not page.run("document.querySelector('aside').checkVisibility()")
        page.run("document.querySelector('#side summary').click()")
        assert page.run("document.getElementById('speed-on').checkVisibility()")
        page.set("prompt", "hello")
        page.run("document.getElementById('compare').click()")
        page.wait(f"document.querySelector('.verdict') && {IDLE}")
        assert page.run("document.documentElement.scrollWidth") <= 390

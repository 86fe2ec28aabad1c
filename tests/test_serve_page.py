"""The page at / in a real browser, driven over the DevTools pipe: typed into, clicked, read, photographed."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.browser import Page, browsing, needs_browser
from support.server import TEXT, Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--step-seconds", "0.01") as running:
        yield running


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    """A server whose answers take half an hour without drafts: something can be done meanwhile."""
    with serving("--step-seconds", "0.1", "--text", "word " * 20_000, "--max-length", "1000000") as running:
        yield running


@contextmanager
def chatting(server: Server, profile: Path) -> Iterator[Page]:
    """The page, ready, without drafts, for long answers, and with the bodies of its requests in `sent`."""
    with browsing(profile) as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        page.run("document.getElementById('draft').click()")
        page.set("max-tokens", str(LONG))
        page.run(
            "var sent = [], real = window.fetch;"
            "window.fetch = (url, options) => { if (options?.body) sent.push(options.body); return "
            "real(url, options); }"
        )
        yield page


@contextmanager
def aborting(server: Server) -> Iterator[None]:
    """What is done here makes the page leave the answer that is being made: the server gives it up."""
    server.wait_for_running(1)
    yield
    server.wait_for_running(0)


LONG = 100_000  # tokens: no limit here
WORDS = "document.querySelectorAll('.assistant .target').length"
IDLE = "document.getElementById('send').textContent === 'send'"
BUSY = "document.getElementById('send').textContent === 'stop'"
DONE = "document.querySelectorAll('.assistant[data-done]').length"


def test_the_page_is_self_contained(server: Server) -> None:
    page = server.http.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("/", "/chat.css", "/chat.js"):
        text = server.http.get(name).text
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
    assert server.http.get("/../app.py").status_code == 404


@pytest.mark.slow
@needs_browser
def test_chat_shows_accepted_rejected_and_target_made_tokens(server: Server, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        page.press_enter("tell me <b>about</b> a fox")
        page.wait("document.querySelectorAll('.assistant[data-done]').length === 1")

        def texts(selector: str) -> list[str]:
            return page.run(f"[...document.querySelectorAll('{selector}')].map((e) => e.textContent)")  # type: ignore[no-any-return]

        assert texts(".turn.user") == ["tell me <b>about</b> a fox"], "text is shown as text"
        shown = page.run(
            "[...document.querySelectorAll('.assistant span.accepted, .assistant span.target')]"
            ".map((e) => e.textContent).join('')"
        )
        assert shown == TEXT
        rounds = len(texts(".assistant .rejected"))
        accepted, made = len(texts(".assistant .accepted")), len(texts(".assistant .target"))
        assert rounds > 20 and 2 * rounds - accepted in (0, 1, 2), (
            "two of four drafts are accepted, fewer in the last round"
        )
        assert made in (rounds + 1, rounds, rounds - 1)
        line = "getComputedStyle(document.querySelector('.assistant .rejected')).textDecorationLine"
        assert page.run(line) == "line-through"
        assert 2.5 < float(texts("#accepted-len")[0]) <= 3.0
        page.wait("document.getElementById('budget').textContent === '75 %'")

        page.run("document.getElementById('draft').click()")
        page.press_enter("something else")
        page.wait(f"{DONE} === 2")
        assert [texts(name)[0] for name in ("#speed-on", "#ratio")] == ["–", "–"], (
            "other questions are not compared"
        )
        page.click("clear")
        page.press_enter("tell me <b>about</b> a fox")
        page.wait(f"{DONE} === 1")
        fast, slow = float(texts("#speed-on")[0]), float(texts("#speed-off")[0])
        assert 290 < fast <= 300 and slow == 100, "three tokens or one in each step of 10 ms"
        assert texts("#ratio") == [f"{fast / slow:.2f} ×"]
        assert not texts(".error") and not page.console, page.console

        picture = base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])
        assert len(picture) > 10_000
        wanted = os.environ.get("DRAFTKIT_SCREENSHOT")
        if wanted:
            Path(wanted).write_bytes(picture)


@pytest.mark.slow
@needs_browser
def test_the_page_works_with_an_api_key_and_shows_errors(tmp_path: Path) -> None:
    model = "document.getElementById('model')"
    with serving("--api-key", "schlüssel 密") as server, browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait(f"{model}?.textContent === 'needs an API key'")
        page.press_enter("hi")
        page.wait("document.querySelector('.error')?.textContent.includes('Unauthorized')")
        page.run(
            "var asked = 0, real = window.fetch;"
            "window.fetch = (url, options) => { asked += url === '/v1/models'; return real(url, options); }"
        )

        def give(key: str) -> None:
            page.set("key", key)
            page.run("document.getElementById('key').dispatchEvent(new Event('change'))")

        for number, wrong in enumerate(("secret", "密"), 1):
            give(wrong)
            page.wait(f"asked === {number} && {model}.textContent === 'wrong API key'")
        # where it is tried again, the timer was set before this one
        page.run("new Promise((over) => setTimeout(over, 1100))")
        assert page.run("asked") == 2, "a wrong key does not become right by waiting"
        give("schlüssel 密")
        page.wait(f"{model}.textContent.includes('fake')")
        page.press_enter("hi")
        page.wait(f"{DONE} === 1")


@needs_browser
def test_another_server_in_this_ones_place_is_named_and_any_name_is_read(tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as page:
        with serving("--name", 'odd } "name" \\') as first:
            page.call("Page.navigate", url=first.url + "/")
            page.wait("document.getElementById('model')?.textContent.startsWith('odd } \"name\" \\\\ ·')")
            page.wait("document.getElementById('running').textContent === '0'")
        with serving("--name", "other", "--port", first.url.rsplit(":", 1)[1]):
            page.wait("document.getElementById('model').textContent.startsWith('other ·')")


@needs_browser
def test_a_copy_is_the_answer_alone(server: Server, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        page.press_enter("hi")
        page.wait(f"{DONE} === 1 && document.querySelectorAll('.assistant .rejected').length > 20")
        page.run("getSelection().selectAllChildren(document.querySelector('.assistant'))")
        page.call("Browser.grantPermissions", session=None, permissions=["clipboardReadWrite"])
        page.call(
            "Input.dispatchKeyEvent", type="rawKeyDown", key="c", code="KeyC", modifiers=2, commands=["copy"]
        )
        assert page.run("navigator.clipboard.readText()") == TEXT


@needs_browser
def test_rejected_drafts_are_shown_as_their_box_says_also_after_the_browser_came_back_to_the_page(
    server: Server, tmp_path: Path
) -> None:
    shown = "getComputedStyle(document.querySelector('.assistant .rejected')).display !== 'none'"
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        assert not page.run("document.getElementById('show-rejected').checked"), "hidden unless asked for"
        page.click("show-rejected")
        page.run("addEventListener('unload', () => 0)")  # so that the browser does not keep the page as it is
        page.call("Page.navigate", url=server.url + "/version")
        page.wait("document.body.innerText.includes('version')")
        page.run("window.history.back()")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        page.press_enter("hi")
        page.wait(f"{DONE} === 1")
        checked = "document.getElementById('show-rejected').checked"  # kept or not, as this browser likes
        for _ in range(2):
            assert page.run(shown) == page.run(checked)
            page.click("show-rejected")


@pytest.mark.slow
@needs_browser
def test_a_screen_reader_gets_the_answer_and_names_for_everything_else(
    server: Server, tmp_path: Path
) -> None:
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        page.press_enter("hi")
        page.wait(f"{DONE} === 1")
        lines = "\\n".join(  # from now on each look finds a round more, so that what is told stays
            f'draftkit:spec_decode_num_{n}_total{{model_name="fake"}} ${{{each} * rounds}}'
            for n, each in {"drafts": 1, "draft_tokens": 4, "verified_tokens": 3, "wasted_tokens": 1}.items()
        )
        page.run(
            "var rounds = 1000, real = window.fetch; window.fetch = async (url, options) => "
            f"url === '/metrics' ? (rounds += 1, new Response(`{lines}`)) : real(url, options); 0"
        )
        page.wait("rounds > 1002")
        tree = page.call("Accessibility.getFullAXTree")["nodes"]
        named = {(n["role"]["value"], n.get("name", {}).get("value")) for n in tree if not n["ignored"]}
        pictures = [name for role, name in named if role in ("image", "Canvas", "img")]
        assert {("log", "conversation"), ("textbox", "your question")} <= named
        assert (
            len(pictures) == 1
            and pictures[0]
            and pictures[0].startswith("per round in the last second: 4.0 tokens drafted")
        )
        rejected = page.run("document.querySelector('.assistant .rejected').textContent")
        assert rejected and not [
            n for n in tree if n.get("name", {}).get("value") == rejected and not n["ignored"]
        ]


@needs_browser
def test_kinds_of_tokens_differ_by_more_than_colour_and_can_be_read_in_both_schemes(
    server: Server, tmp_path: Path
) -> None:
    contrast = """((kind) => {
        const box = document.createElement('div'); box.style.background = 'Canvas'; document.body.append(box);
        const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const style = getComputedStyle(document.querySelector('#legend .' + kind));
        const shades = [light(style.color), light(getComputedStyle(box).backgroundColor)];
        const [low, high] = shades.sort((a, b) => a - b);
        return style.opacity === '1' ? (high + 0.05) / (low + 0.05) : 0; })"""
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        kinds = ("accepted", "target", "rejected")
        line = "getComputedStyle(document.querySelector('#legend .{}')).textDecorationLine"
        assert len({page.run(line.format(kind)) for kind in kinds}) == 3
        for scheme in ("light", "dark"):
            page.call(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
            )
            assert [kind for kind in kinds if page.run(f"{contrast}('{kind}')") < 4.5] == [], scheme


@pytest.mark.slow
@needs_browser
def test_shares_of_nothing_are_not_a_number(server: Server, tmp_path: Path) -> None:
    """Rounds in which nothing was drafted."""
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        names = ("drafts", "draft_tokens", "verified_tokens", "wasted_tokens")
        lines = "\\n".join(
            f'draftkit:spec_decode_num_{n}_total{{model_name="fake"}} ${{rounds.{n}}}' for n in names
        )
        page.run(
            "var rounds = { drafts: 0, draft_tokens: 8, verified_tokens: 4, wasted_tokens: 1 };"
            "for (const name of ['budget', 'wasted']) document.getElementById(name).textContent = 'old';"
            f"window.fetch = async () => {{ rounds.drafts += 1; return new Response(`{lines}`); }}; 0"
        )
        page.wait("rounds.drafts >= 3")
        assert page.run("['budget', 'wasted'].map((name) => document.getElementById(name).textContent)") == [
            "–",
            "–",
        ]


@needs_browser
def test_the_stop_button_stops_and_enter_leaves_the_answer_and_the_next_question_alone(
    slow: Server, tmp_path: Path
) -> None:
    with chatting(slow, tmp_path / "profile") as page:
        page.press_enter("first")
        page.wait(f"{WORDS} >= 1 && {BUSY}")
        page.press_enter("second")
        page.press_enter()
        so_far = page.run(WORDS)
        page.wait(f"{WORDS} > {so_far}")
        assert page.run(BUSY) and page.value("prompt") == "second" and page.run("sent.length") == 1

        page.set("prompt", "")
        with aborting(slow):
            page.click("send")
            page.wait(f"{IDLE} && document.querySelector('.error')?.textContent === ' (stopped)'")
        assert page.run(DONE) == 0

        came = page.run("document.querySelector('.assistant').textContent").removesuffix(" (stopped)")
        page.set("max-tokens", "1")
        page.press_enter("second")
        page.wait(f"{DONE} === 1")
        assert came
        assert page.sent() == [("user", "first"), ("assistant", came), ("user", "second")], (
            "what came is what was said"
        )

        page.set("max-tokens", str(LONG))
        page.press_enter("third")
        page.wait(f"{WORDS} >= 3 && {BUSY}")
        page.set("prompt", "fourth")
        page.click("send")
        page.wait(IDLE)
        assert page.value("prompt") == "fourth", "stopping keeps what was typed"


@needs_browser
def test_a_new_conversation_drops_the_answer_that_runs(slow: Server, tmp_path: Path) -> None:
    with chatting(slow, tmp_path / "profile") as page:
        page.press_enter("old")
        page.wait(f"{WORDS} >= 1 && {BUSY}")
        page.click("clear")
        assert page.run(IDLE)
        # At once, so that the old answer ends while the new one runs.
        page.press_enter("new")
        page.wait(f"{WORDS} >= 1 && {BUSY}")
        assert page.sent() == [("user", "new")] and page.run("document.querySelectorAll('.turn').length") == 2
        page.click("send")
        page.wait(IDLE)

        page.click("clear")
        page.press_enter("old again")
        page.wait(f"{WORDS} >= 1 && {BUSY}")
        with aborting(slow):
            page.click("clear")
        page.set("max-tokens", "1")
        page.press_enter("newer")
        page.wait(f"{DONE} === 1")
        page.press_enter("newest")
        page.wait(f"{DONE} === 2")
        assert [role for role, _ in page.sent()] == ["user", "assistant", "user"]
        assert page.sent()[0] == ("user", "newer")


@needs_browser
def test_a_failed_question_is_not_sent_again_and_can_be_asked_again(server: Server, tmp_path: Path) -> None:
    half = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\ndata: {"error": {"message": "broke"}}\n\n'
    failing = ("Promise.reject(new TypeError('gone'))", f"Promise.resolve(new Response({json.dumps(half)}))")
    with chatting(server, tmp_path / "profile") as page:
        page.set("max-tokens", "0")
        page.press_enter("why?")
        page.wait(f"{IDLE} && document.querySelector('.error')")
        page.set("max-tokens", "2")
        for number, answer in enumerate(failing, 2):
            page.run(
                f"var working = window.fetch; window.fetch = (u, o) => o?.body ? {answer} : real(u, o); 0"
            )
            page.press_enter("why?")
            page.wait(f"{IDLE} && document.querySelectorAll('.error').length === {number}")
            page.run("window.fetch = working; 0")
        page.press_enter("why?")
        page.wait(f"{DONE} === 1")
        assert page.sent() == [("user", "why?")]
        assert page.run("document.querySelectorAll('.turn.user').length") == 4, "the page still shows them"
        page.press_enter("and?")
        page.wait(f"{DONE} === 2")
        assert [role for role, _ in page.sent()] == ["user", "assistant", "user"]


@needs_browser
def test_speed_is_the_servers_and_leaves_out_the_tokens_before_its_clock_started(
    server: Server, tmp_path: Path
) -> None:
    """One token, and two times two in 0.5 s each by the server's clock: the page gets them all at once."""
    chunks = []
    for seconds, count in ((0.0, 1), (0.5, 2), (1.0, 2)):
        origins = {"tokens": [["a", "target"]] * count, "rejected": []}
        metrics = {"speculative_decoding": None, "decode_seconds": seconds}
        chunks.append(
            {"choices": [{"delta": {"content": "a" * count}, "origins": origins}], "metrics": metrics}
        )
    with chatting(server, tmp_path / "profile") as page:
        for number, (come, told) in enumerate(((1, "1 tokens, "), (3, "5 tokens, 4 tokens/s, ")), 1):
            stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks[:come])
            answer = f"Promise.resolve(new Response({json.dumps(stream)}))"
            page.run(f"window.fetch = (u, o) => o?.body ? {answer} : real(u, o); 0")
            page.press_enter(f"question {number}")
            page.wait(f"{DONE} === {number}")
            assert (
                page.run(f"document.querySelectorAll('.note')[{number - 1}].textContent")
                == told + "no drafts"
            )
            assert page.run("document.getElementById('speed-off').textContent") == ("–" if come == 1 else "4")


@needs_browser
def test_events_are_read_with_and_without_a_space_after_the_colon(server: Server, tmp_path: Path) -> None:
    stream = 'data:{"n":1}\n\ndata: {"n":2}\n\ndata:[DONE]\n\ndata: [DONE]\n\n'
    with chatting(server, tmp_path / "profile") as page:
        read = f"for await (const event of events(new Response({json.dumps(stream)}))) found.push(event.n);"
        assert page.run(f"(async () => {{ const found = []; {read} return found; }})()") == [1, 2]

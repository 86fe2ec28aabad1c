"""The page at / in a real browser, driven over the DevTools pipe: typed into, clicked, read, photographed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_serve_harness import TEXT, Server, serving

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None and "CI" not in os.environ, reason="no chromium on this machine: apt-get install chromium"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1100,700 --remote-debugging-pipe"
).split()


class Page:
    """One tab. Commands go in as JSON with a NUL behind each, answers come out the same way."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, os.fdopen(out, "rb")
        self._serial, self._rest = 0, b""
        self.console: list[str] = []
        target = self.call("Target.createTarget", session=None, url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, session: str | None = "own", **params: Any) -> dict[str, Any]:
        self._serial += 1
        message: dict[str, Any] = {"id": self._serial, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._serial:
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return dict(answer["result"])
            told = answer.get("params", {})
            wrong = told.get("entry", {}).get("level") in ("error", "warning")
            if answer.get("method") == "Runtime.exceptionThrown" or wrong:
                self.console.append(json.dumps(answer["params"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = self._out.read1(65536)
            if not piece:
                raise RuntimeError("the browser has closed")
            self._rest += piece
        first, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(first))

    def run(self, script: str) -> Any:
        """The value of a script; promises are awaited."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise RuntimeError(told["exceptionDetails"])
        return told["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a condition holds in the page, 10 seconds at most."""
        script = f"""new Promise((yes) => {{ let left = 200; const look = () =>
            ({condition}) ? yes(true) : left-- > 0 ? setTimeout(look, 50) : yes(false); look(); }})"""
        assert self.run(script), f"{condition}: {self.run('document.body.innerText')} {self.console}"


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    to_browser, into = os.pipe()
    out, from_browser = os.pipe()
    # The browser reads commands from descriptor 3 and writes to 4.
    command = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" "$@"'
    process = subprocess.Popen(
        ["/bin/bash", "-c", command, str(BROWSER), *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(to_browser, from_browser),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_browser)
    os.close(from_browser)
    watchdog = threading.Timer(60, process.kill)  # a browser that hangs ends the test instead of blocking it
    watchdog.start()
    try:
        yield Page(into, out)
    finally:
        watchdog.cancel()
        os.close(into)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--step-seconds", "0.01") as running:
        yield running


def test_the_page_is_self_contained(server: Server) -> None:
    page = server.http.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("/", "/chat.css", "/chat.js"):
        text = server.http.get(name).text
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
    assert server.http.get("/../app.py").status_code == 404


@needs_browser
def test_chat_shows_accepted_rejected_and_target_made_tokens(server: Server, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent.includes('fake')")
        page.run("document.getElementById('prompt').focus()")
        page.call("Input.insertText", text="tell me <b>about</b> a fox")
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13)
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
        assert rounds > 20 and 2 * rounds - accepted in (0, 1, 2), "two of four drafts are accepted, fewer in the last round"
        assert made in (rounds + 1, rounds, rounds - 1)
        line = "getComputedStyle(document.querySelector('.assistant .rejected')).textDecorationLine"
        assert page.run(line) == "line-through"
        assert 2.5 < float(texts("#accepted-len")[0]) <= 3.0
        page.wait("document.getElementById('budget').textContent === '75 %'")

        page.run("document.getElementById('draft').click(); document.getElementById('prompt').value = 'again'")
        page.run("document.getElementById('send').click()")
        page.wait("document.querySelectorAll('.assistant[data-done]').length === 2")
        fast, slow = float(texts("#speed-on")[0]), float(texts("#speed-off")[0])
        assert fast > 1.5 * slow > 0 and texts("#ratio")[0].endswith("×")
        assert not texts(".error") and not page.console, page.console

        picture = base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])
        assert len(picture) > 10_000
        wanted = os.environ.get("DRAFTKIT_SCREENSHOT")
        if wanted:
            Path(wanted).write_bytes(picture)


@needs_browser
def test_the_page_works_with_an_api_key_and_shows_errors(tmp_path: Path) -> None:
    with serving("--api-key", "secret") as server, browsing(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url + "/")
        page.wait("document.getElementById('model')?.textContent === 'needs an API key'")
        page.run("document.getElementById('prompt').value = 'hi'; document.getElementById('send').click()")
        page.wait("document.querySelector('.error')?.textContent.includes('Unauthorized')")
        page.run("const k = document.getElementById('key'); k.value = 'secret'; k.dispatchEvent(new Event('change'))")
        page.wait("document.getElementById('model').textContent.includes('fake')")
        page.run("document.getElementById('prompt').value = 'hi'; document.getElementById('send').click()")
        page.wait("document.querySelectorAll('.assistant[data-done]').length === 1")

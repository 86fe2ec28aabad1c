"""A real browser, driven over the DevTools pipe: pages are opened, typed into, clicked and read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.patience import PATIENCE

BROWSER = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None
)
needs_browser = pytest.mark.skipif(
    BROWSER is None and "CI" not in os.environ, reason="no chromium on this machine: apt-get install chromium"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1100,700 "
    "--remote-debugging-pipe"
).split()


class Page:
    """One tab. Commands go in as JSON with a NUL after each, answers come out the same way."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, os.fdopen(out, "rb")
        self._serial, self._rest = 0, b""
        self.console: list[str] = []
        target = self.call("Target.createTarget", session=None, url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", session=None, targetId=target, flatten=True)[
            "sessionId"
        ]
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
        """Until a condition holds in the page."""
        script = f"""new Promise((yes) => {{ const until = Date.now() + {1000 * PATIENCE}; const look = () =>
            ({condition}) ? yes(true) : Date.now() < until ? setTimeout(look, 50) : yes(false); look(); }})"""
        assert self.run(script), f"{condition}: {self.run('document.body.innerText')} {self.console}"

    def press_enter(self, text: str = "") -> None:
        """Types a text into the question's box and presses Enter there."""
        self.run("document.getElementById('prompt').focus()")
        self.call("Input.insertText", text=text)
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13
        )

    def click(self, name: str) -> None:
        """A mouse click in the middle of an element: unlike its click(), one that has to hit it."""
        place = (
            f"const e = document.getElementById('{name}'); e.scrollIntoView(); const r = "
            f"e.getBoundingClientRect();"
        )
        x, y = self.run(f"(() => {{ {place} return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def set(self, name: str, value: str) -> None:
        self.run(f"document.getElementById('{name}').value = {json.dumps(value)}")

    def value(self, name: str) -> str:
        return str(self.run(f"document.getElementById('{name}').value"))

    def sent(self) -> list[tuple[str, str]]:
        """Role and text of each message of the last request."""
        messages = self.run("JSON.parse(sent.at(-1)).messages")
        return [(m["role"], m["content"]) for m in messages]


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
    try:
        yield Page(into, out)
    finally:
        os.close(into)
        os.killpg(process.pid, signal.SIGKILL)  # with the processes of its pages
        process.wait()

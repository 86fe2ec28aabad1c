"""`draftkit chat`: a conversation in the terminal, with a server that runs or with one of its own.

The answer's tokens are coloured by where they came from, as on the server's page: drafted and accepted
(green, underlined), or made by the target.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftkit.errors import ServeError

if TYPE_CHECKING:
    import httpx
    from rich.console import Console

HELP = "/new begins again, /drafts turns drafting off and on, /quit ends (or Ctrl-D)"
_LONGEST_START = 600.0  # seconds in which a server that was started for this has to be ready

EXAMPLE = 'Example: draftkit chat --target smollm2, or: draftkit chat "What is a list?"'


def command(
    question: Annotated[str | None, typer.Argument(help="ask this and end; none = a conversation")] = None,
    url: Annotated[str | None, typer.Option(help="a server that runs; none = one is started here")] = None,
    target: Annotated[str, typer.Option(help="as for draftkit serve, where one is started")] = "tiny",
    drafter: Annotated[str | None, typer.Option("--drafter", "-d", help="as for draftkit serve")] = None,
    dtype: Annotated[str | None, typer.Option(help="as for draftkit serve")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DRAFTKIT_API_KEY", help="of the server")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="of an answer, at most; default: what the context holds", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 = the most likely token each time", min=0)] = 0.0,
    no_drafts: Annotated[bool, typer.Option("--no-drafts", help="begin with the target alone")] = False,
) -> None:
    """Talk to a target and see which tokens were drafted."""
    from rich.console import Console

    settings: dict[str, Any] = {"temperature": temperature}
    if max_tokens is not None:
        settings["max_tokens"] = max_tokens
    console = Console(highlight=False)
    if url is not None:
        with _client(url, api_key) as http:
            _converse(Conversation(http, settings, console, not no_drafts), question)
        return
    from draftkit.commands.early import check_serving
    from draftkit.engine.settings import EngineSettings

    check_serving(target, drafter, EngineSettings(dtype=dtype))
    options = [
        "--target",
        target,
        *(["--drafter", drafter] if drafter else []),
        *(["--dtype", dtype] if dtype else []),
    ]
    with _server(options, Console(stderr=True)) as own, _client(own, None) as http:
        _converse(Conversation(http, settings, console, not no_drafts), question)


class Conversation:
    """Messages so far, and how the next answer is asked for. A failed answer leaves no trace in it."""

    def __init__(
        self, http: httpx.Client, settings: dict[str, Any], console: Console, drafting: bool = True
    ) -> None:
        self.drafting = drafting
        self.messages: list[dict[str, str]] = []
        self._http, self._settings, self._console = http, settings, console

    def ask(self, question: str) -> None:
        """Print the answer as it is made, and a line of statistics. Raises ServeError."""
        asked = [*self.messages, {"role": "user", "content": question}]
        body = {
            "messages": asked,
            "stream": True,
            "draft": self.drafting,
            "return_token_origins": True,
            "return_spec_stats": True,
            **self._settings,
        }
        answer, count, first = "", 0, 0
        metrics: dict[str, Any] = {}
        for chunk in _events(self._http, body):
            choice = (chunk.get("choices") or [{}])[0]
            answer += (choice.get("delta") or {}).get("content") or ""
            metrics = chunk.get("metrics") or metrics
            if "origins" not in choice:
                continue
            for text, origin in choice["origins"]["tokens"]:
                style = "green underline" if origin == "accepted" else None
                self._console.print(text, style=style, end="", markup=False, soft_wrap=True)
            count += len(choice["origins"]["tokens"])
            first = first or count
        line = statistics(count, first, metrics, self.drafting)
        self._console.print(f"\n[dim]{line}[/dim]\n", soft_wrap=True)
        self.messages = [*asked, {"role": "assistant", "content": answer}]


def statistics(count: int, first: int, metrics: dict[str, Any], drafting: bool) -> str:
    """One line about an answer of `count` tokens, the `first` of which came before the server's clock ran."""
    seconds = metrics.get("decode_seconds") or 0.0
    parts = [f"{count} tokens"]
    if count > first and seconds > 0:
        parts.append(f"{(count - first) / seconds:.0f} tokens/s")
    told = metrics.get("speculative_decoding") or {}
    rounds, gamma = told.get("num_spec_steps") or 0, told.get("num_spec_tokens") or 0
    if not gamma:
        parts.append("no drafter")
    elif not drafting:
        parts.append("drafts are off")
    elif rounds:
        parts.append(f"accepted length {told['mean_acceptance_length']:.2f}")
        share = told["num_draft_tokens"] / (gamma * rounds)
        rests = "" if share > 0.5 else ": it rested, where the target alone was measured to be faster"
        parts.append(f"the drafter took part in {100 * share:.0f} % of {rounds} rounds{rests}")
    return ", ".join(parts)


def _converse(talk: Conversation, question: str | None) -> None:
    if question is not None:
        talk.ask(question)
        return
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401  # input() then takes arrows and history

        typer.echo(HELP, err=True)
    while True:
        try:
            line = input("> " if asks else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/new":
            talk.messages = []
        elif line == "/drafts":
            talk.drafting = not talk.drafting
            typer.echo(f"drafts are {'on' if talk.drafting else 'off'}", err=True)
        elif line.startswith("/"):
            typer.echo(HELP, err=True)
        elif line:
            talk.ask(line)


def _client(url: str, api_key: str | None) -> httpx.Client:
    import httpx

    headers = {b"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
    base = url.rstrip("/").removesuffix("/v1")
    return httpx.Client(
        base_url=base, headers=headers, timeout=httpx.Timeout(600, connect=5), trust_env=False
    )


def _events(http: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer. Raises ServeError."""
    import httpx

    try:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ServeError(f"{http.base_url}: {_message(response)}")
            for line in response.iter_lines():
                if line.startswith("data:") and line[5:].lstrip().startswith("{"):
                    chunk = json.loads(line[5:])
                    if chunk.get("error"):
                        raise ServeError(f"{http.base_url}: {chunk['error'].get('message')}")
                    yield chunk
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ServeError(
            f"{http.base_url}: does not answer ({error}); is the server up, the URL right?"
        ) from error


def _message(response: httpx.Response) -> str:
    """What a server says is wrong."""
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"


@contextmanager
def _server(options: list[str], console: Console) -> Iterator[str]:
    """The URL of a server of our own, which ends with the conversation. Raises ServeError with its last line
    when it does not come up."""
    import httpx

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "draftkit", "serve", "--port", "0", *options]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        try:
            with console.status("loading the target"):
                url = _address(process, log)
                while not _is_ready(url, httpx):
                    _check_alive(process, log)
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens, as its log says."""
    ends = time.monotonic() + _LONGEST_START
    while time.monotonic() < ends:
        for word in log.read_text("utf-8", "replace").split():
            if word.startswith("http://"):
                return word
        _check_alive(process, log)
        time.sleep(0.05)
    raise ServeError("the server that was started here does not come up; try draftkit serve")


def _check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        lines = log.read_text("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise ServeError(lines[-1].removeprefix("error: "))


def _is_ready(url: str, httpx: Any) -> bool:
    try:
        return bool(httpx.get(f"{url}/ready", trust_env=False, timeout=5).status_code == 200)
    except httpx.HTTPError:
        return False

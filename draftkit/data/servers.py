"""Answers from OpenAI-compatible servers (vLLM, SGLang, llama-server, ours), several at once.

Each server pulls the next question when it has room, so that a slow one takes fewer. One that fails rests,
longer each time, and its questions go back to the others. Where nothing is left to ask, what has been open
for OVERDUE seconds at one server is asked at another, too, so that a server that hangs holds nothing up;
an answer is taken once. Where a server gives token ids, prompts go to /v1/completions as the very ids of
the prompt format and the ids of the answer come back; elsewhere messages go to /v1/chat/completions and
come back as text.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from draftkit.data.answers import NO_ROOM, Answer, Answers, Question, answer_limit
from draftkit.errors import ServeError
from draftkit.ops.sampling import combined_seed
from draftkit.settings import GenerateSettings
from draftkit.target.prompt_format import PromptFormat

FIRST_REST, LONGEST_REST = 0.5, 60.0  # seconds after a failure, doubled each time
OVERDUE = 60.0  # seconds after which an idle server may be asked what another was asked
GIVE_UP = 900.0  # seconds without an answer after which a failing server is left alone
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_LOOK = 1.0  # seconds between looks of an idle place
_PROBE = [{"role": "user", "content": "Hello"}]
_UNKNOWN_LENGTH = 2**30


class _TryElsewhere(Exception):
    """The server cannot answer now; `rest` is how long it asks for."""

    def __init__(self, reason: str, rest: float | None = None) -> None:
        super().__init__(reason)
        self.rest = rest


class _WrongServer(Exception):
    """The server is not what it was taken for: nothing of it is used any more."""


@dataclass
class _Server:
    url: str
    model: str
    gives_ids: bool
    max_length: int
    rest: float = FIRST_REST
    until: float = 0.0
    well: float = field(default_factory=time.monotonic)  # when it last answered
    trouble: str = ""


@dataclass
class _Asked:
    """A question that is open, and where it is being answered since when."""

    question: Question
    settings: GenerateSettings
    at: dict[str, float] = field(default_factory=dict)


class ServerAnswers(Answers):
    """Answers through servers, at most `per_server` questions at the same time at each.

    Raises ServeError when one cannot be reached, serves another model than `model` (where it is given), or
    renders messages to other tokens than `prompt_format` does.
    """

    def __init__(
        self,
        urls: Sequence[str],
        prompt_format: PromptFormat,
        per_server: int,
        model: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self._format, self._per_server = prompt_format, per_server
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        with httpx.Client(headers=self._headers, timeout=TIMEOUT) as client:
            self._servers = [
                _look_at(client, url.rstrip("/").removesuffix("/v1"), model, prompt_format) for url in urls
            ]
        self.model = self._servers[0].model
        self._open: set[str] = set()
        self._found: queue.SimpleQueue[tuple[str, Answer] | Exception] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._waiting: asyncio.Queue[_Asked] = asyncio.Queue()
        self._working: dict[str, _Asked] = {}  # by key; of the servers' thread
        threading.Thread(target=self._run, daemon=True, name="draftkit-servers").start()

    @property
    def room(self) -> int:
        """As many as all servers work on, and as many again that wait: nobody is idle."""
        return 2 * self._per_server * len(self._servers) - len(self._open)

    def ask(self, question: Question, settings: GenerateSettings) -> None:
        """Begin to answer."""
        self._open.add(question.key)
        self._loop.call_soon_threadsafe(self._waiting.put_nowait, _Asked(question, settings))

    def finished(self) -> list[tuple[str, Answer]]:
        """Wait for answers. Raises ServeError when no server is left, or one refuses a question for good."""
        found = [self._found.get()]
        with suppress(queue.Empty):
            while True:
                found.append(self._found.get_nowait())
        taken: list[tuple[str, Answer]] = []
        for one in found:
            if isinstance(one, Exception):
                raise one
            self._open.discard(one[0])
            taken.append(one)
        return taken

    # ---- the servers' thread ----

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._work())

    async def _work(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=self._headers, timeout=TIMEOUT, limits=limits) as client:
            await asyncio.gather(
                *(self._pull(client, s) for s in self._servers for _ in range(self._per_server))
            )
        told = "; ".join(f"{s.url}: {s.trouble}" for s in self._servers)
        self._found.put(
            ServeError(f"no server is left to answer ({told}); start them and run the same command again")
        )

    async def _pull(self, client: httpx.AsyncClient, server: _Server) -> None:
        """One of a server's places: it takes a question when it is free, until the server is given up."""
        while server.until < float("inf"):
            if (left := server.until - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 1.0))
                continue
            if (asked := await self._next(server)) is None:
                continue
            key = asked.question.key
            self._working[key] = asked
            asked.at[server.url] = time.monotonic()
            try:
                answer = await _answer(client, server, asked.question, asked.settings, self._format)
            except _TryElsewhere as error:
                self._give_back(asked, server)
                _rest(server, str(error), error.rest)
            except _WrongServer as error:
                self._give_back(asked, server)
                server.trouble, server.until = str(error), float("inf")
            except Exception as error:  # a bug, or a question that is refused: told where answers are awaited
                self._found.put(error)
            else:
                server.rest, server.well = FIRST_REST, time.monotonic()
                if self._working.get(key) is asked:  # else another server was faster
                    del self._working[key]
                    self._found.put((key, answer))

    async def _next(self, server: _Server) -> _Asked | None:
        """What a free place asks next: a question that waits, else one that is overdue elsewhere; None: look
        again."""
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._waiting.get(), _LOOK)
        overdue = time.monotonic() - OVERDUE
        late = (a for a in self._working.values() if server.url not in a.at and max(a.at.values()) < overdue)
        return next(late, None)

    def _give_back(self, asked: _Asked, server: _Server) -> None:
        """The server could not answer: others can, unless one of them is at it, or has done it."""
        asked.at.pop(server.url, None)
        if self._working.get(asked.question.key) is asked and not asked.at:
            del self._working[asked.question.key]
            self._waiting.put_nowait(asked)


def _rest(server: _Server, trouble: str, asked: float | None) -> None:
    """Leave a server alone for a while. Failures that come in together count once."""
    now = time.monotonic()
    if server.until > now:
        return
    server.trouble = trouble
    if now - server.well > GIVE_UP:
        server.until = float("inf")
        return
    server.until = now + (asked if asked is not None else server.rest)
    server.rest = min(2 * server.rest, LONGEST_REST)


async def _answer(
    client: httpx.AsyncClient,
    server: _Server,
    question: Question,
    settings: GenerateSettings,
    shown: PromptFormat,
) -> Answer:
    """One answer. Raises _TryElsewhere, _WrongServer, or ServeError for a question that is refused."""
    limit = answer_limit(server.max_length, len(question.prompt_ids), settings)
    if not limit:
        return NO_ROOM
    body = _sampling(settings, limit, question.seed) | {"model": server.model}
    if server.gives_ids:
        path, body = "/v1/completions", body | {"prompt": list(question.prompt_ids), "return_token_ids": True}
    else:
        path, body = "/v1/chat/completions", body | _as_chat(question.messages, question.tools, shown)
    try:
        response = await client.post(server.url + path, json=body)
    except httpx.HTTPError as error:
        raise _TryElsewhere(f"{type(error).__name__} {error}".strip()) from error
    said = _body_of(response, question.key, server)
    choice = said["choices"][0]
    reason = str(choice.get("finish_reason") or "stop")
    if server.gives_ids:
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids:
            raise _TryElsewhere("an answer came without its token ids")
        return Answer(tuple(ids), reason)
    return Answer((), "stop" if reason == "tool_calls" else reason, _message_of(choice["message"]))


def _sampling(settings: GenerateSettings, limit: int, seed: tuple[int, int]) -> dict[str, Any]:
    """Sampling fields by the names that OpenAI's API and its extensions have."""
    fields: dict[str, Any] = {
        "max_tokens": limit,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": combined_seed(*seed) % 2**31,  # what every server takes
    }
    return fields | ({"top_k": settings.top_k} if settings.top_k else {})


def _as_chat(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], shown: PromptFormat
) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": list(messages)}
    if tools:
        body["tools"] = list(tools)
    if shown.switches:
        body["chat_template_kwargs"] = dict(shown.switches)
    return body


def _message_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The assistant's message under the names that records have."""
    reasoning = raw.get("reasoning_content") or raw.get("reasoning")
    found = {"role": "assistant", "content": raw.get("content")}
    found |= {"reasoning_content": reasoning, "tool_calls": raw.get("tool_calls")}
    return {k: v for k, v in found.items() if v or k in ("role", "content")}


def _body_of(response: httpx.Response, key: str, server: _Server) -> dict[str, Any]:
    """What a server answered. Raises _TryElsewhere for what passes, _WrongServer for what does not,
    ServeError for a question that no server would take."""
    code = response.status_code
    if code == 429 or code >= 500:
        raise _TryElsewhere(f"answers {code}", _retry_after(response))
    try:
        said = response.json()
    except ValueError:
        raise _TryElsewhere(f"answers {code} with something else than JSON: {response.text[:60]!r}") from None
    if code in (401, 403, 404):
        raise _WrongServer(f"answers {code}: {_error_text(said)}")
    if code >= 400:
        raise ServeError(
            f"{server.url} refuses conversation {key} ({code}: {_error_text(said)}); change or remove it"
        )
    if not isinstance(said, dict) or not said.get("choices"):
        raise _TryElsewhere(f"answers without choices: {str(said)[:60]!r}")
    if said.get("model", server.model) != server.model:
        raise _WrongServer(f"answers as the model {said['model']!r}, was asked for {server.model!r}")
    return said


def _error_text(said: Any) -> str:
    error = said.get("error", said) if isinstance(said, dict) else said
    return " ".join(str(error.get("message", error) if isinstance(error, dict) else error).split())[:160]


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header; a date, or nonsense, counts as none."""
    try:
        return max(0.0, min(float(response.headers["retry-after"]), LONGEST_REST))
    except (KeyError, ValueError):
        return None


def _look_at(client: httpx.Client, url: str, model: str | None, shown: PromptFormat) -> _Server:
    """What a server serves, and whether it shows messages as we do. Raises ServeError."""
    try:
        listed = client.get(f"{url}/v1/models").json()["data"]
        names = {str(m["id"]): m for m in listed}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ServeError(
            f"--server {url}: is no OpenAI-compatible server ({type(error).__name__} {error})"
        ) from error
    chosen = model or next(iter(names), "")
    if chosen not in names:
        raise ServeError(
            f"--server {url}: does not serve {chosen!r} but {', '.join(names) or 'nothing'}; give --model"
        )
    length = names[chosen].get("max_model_len")
    server = _Server(url, chosen, False, length if isinstance(length, int) else _UNKNOWN_LENGTH)
    wanted = shown.prompt(_PROBE)
    plain = {"model": chosen, "max_tokens": 1, "temperature": 0}
    chat = _said(client, url, "/v1/chat/completions", plain | _as_chat(_PROBE, (), shown))
    counted = (chat.get("usage") or {}).get("prompt_tokens")
    if counted is not None and counted != len(wanted):
        raise ServeError(
            f"--server {url}: shows its model {counted} tokens where this recipe shows {len(wanted)}: "
            f"another chat template, "
            "tokenizer or other template switches; serve the recipe's target"
        )
    try:
        given = _said(
            client, url, "/v1/completions", plain | {"prompt": list(wanted), "return_token_ids": True}
        )
        server.gives_ids = isinstance(given["choices"][0].get("token_ids"), list)
    except ServeError:
        server.gives_ids = False  # no completions, or none of token ids
    return server


def _said(client: httpx.Client, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        response = client.post(url + path, json=body)
        said = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServeError(
            f"--server {url}: does not answer {path} ({type(error).__name__} {error})"
        ) from error
    if response.status_code >= 400 or not isinstance(said, dict) or not said.get("choices"):
        raise ServeError(f"--server {url}: answers {path} with {response.status_code}: {_error_text(said)}")
    return said

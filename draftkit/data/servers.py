"""Answers from OpenAI-compatible servers (vLLM, SGLang, llama-server, ours), several at once.

Each server pulls the next question when it has room, so that a slow one takes fewer. One that fails rests,
longer each time, and its questions go back to the others. Where nothing is left to ask, what has been open
for OVERDUE seconds at one server is asked at another, too, so that a server that hangs holds nothing up;
an answer is taken once. What is sent and what comes back is in `server_requests.py`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from draftkit.data.answers import Answer, Answers, Question
from draftkit.data.server_requests import TIMEOUT, Server, TryElsewhere, WrongServer, answer_of, look_at
from draftkit.errors import ServeError
from draftkit.settings import GenerateSettings
from draftkit.target.prompt_format import PromptFormat

FIRST_REST, LONGEST_REST = 0.5, 60.0  # seconds after a failure, doubled each time
OVERDUE = 60.0  # seconds after which an idle server may be asked what another was asked
GIVE_UP = 900.0  # seconds without an answer after which a failing server is left alone
_LOOK = 1.0  # seconds between looks of an idle place


@dataclass
class _Member:
    """A server, and how it has done lately."""

    server: Server
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
            self._members = [
                _Member(look_at(client, url.rstrip("/").removesuffix("/v1"), model, prompt_format))
                for url in urls
            ]
        self.model = self._members[0].server.model
        self._open: set[str] = set()
        self._found: queue.SimpleQueue[tuple[str, Answer] | Exception] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._waiting: asyncio.Queue[_Asked] = asyncio.Queue()
        self._working: dict[str, _Asked] = {}  # by key; of the servers' thread
        threading.Thread(target=self._run, daemon=True, name="draftkit-servers").start()

    @property
    def room(self) -> int:
        """As many as all servers work on, and as many again that wait: nobody is idle."""
        return 2 * self._per_server * len(self._members) - len(self._open)

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
                *(self._pull(client, m) for m in self._members for _ in range(self._per_server))
            )
        told = "; ".join(f"{m.server.url}: {m.trouble}" for m in self._members)
        self._found.put(
            ServeError(f"no server is left to answer ({told}); start them and run the same command again")
        )

    async def _pull(self, client: httpx.AsyncClient, member: _Member) -> None:
        """One of a server's places: it takes a question when it is free, until the server is given up."""
        while member.until < float("inf"):
            if (left := member.until - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 1.0))
                continue
            if (asked := await self._next(member.server)) is None:
                continue
            key = asked.question.key
            self._working[key] = asked
            asked.at[member.server.url] = time.monotonic()
            try:
                answer = await answer_of(client, member.server, asked.question, asked.settings, self._format)
            except TryElsewhere as error:
                self._give_back(asked, member.server)
                _rest(member, str(error), error.rest)
            except WrongServer as error:
                self._give_back(asked, member.server)
                member.trouble, member.until = str(error), float("inf")
            except Exception as error:  # a bug, or a question that is refused: told where answers are awaited
                self._found.put(error)
            else:
                member.rest, member.well = FIRST_REST, time.monotonic()
                if self._working.get(key) is asked:  # else another server was faster
                    del self._working[key]
                    self._found.put((key, answer))

    async def _next(self, server: Server) -> _Asked | None:
        """What a free place asks next: a question that waits, else one that is overdue elsewhere; None: look
        again."""
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._waiting.get(), _LOOK)
        overdue = time.monotonic() - OVERDUE
        late = (a for a in self._working.values() if server.url not in a.at and max(a.at.values()) < overdue)
        return next(late, None)

    def _give_back(self, asked: _Asked, server: Server) -> None:
        """The server could not answer: others can, unless one of them is at it, or has done it."""
        asked.at.pop(server.url, None)
        if self._working.get(asked.question.key) is asked and not asked.at:
            del self._working[asked.question.key]
            self._waiting.put_nowait(asked)


def _rest(member: _Member, trouble: str, asked: float | None) -> None:
    """Leave a server alone for a while. Failures that come in together count once."""
    now = time.monotonic()
    if member.until > now:
        return
    member.trouble = trouble
    if now - member.well > GIVE_UP:
        member.until = float("inf")
        return
    member.until = now + (min(asked, LONGEST_REST) if asked is not None else member.rest)
    member.rest = min(2 * member.rest, LONGEST_REST)

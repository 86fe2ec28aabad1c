"""One load test of one OpenAI-compatible server: requests, when they go out, and what is measured about each.

Times are seconds on one monotonic clock. Tokens are counted by the server's own usage where it tells, so that
chunks that hold several tokens (speculative decoding) count rightly.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from draftkit.errors import ServeError
from draftkit.serve.settings import LoadSettings


@dataclass
class Record:
    """One request. `gaps` holds one value per token after the first: a chunk's gap is shared by its tokens.

    `ended`: the server said that the answer is complete. `usage_told`: `output_tokens` is the server's count,
    not chunks. `guessed`: a chunk came without a usage and counted as one token, until a later usage counts
    it rightly.
    """

    sent: float
    first: float | None = None
    done: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    chunks: int = 0
    ended: bool = False
    usage_told: bool = False
    guessed: bool = False
    speculation: dict[str, Any] | None = None
    error: str | None = None


def _checked(url: str) -> str:
    """The address itself. Raises ServeError when it cannot be that of a server."""
    try:
        parsed = httpx.URL(url)
        good = parsed.scheme in ("http", "https") and parsed.host and (parsed.port or 0) < 2**16
    except (httpx.InvalidURL, UnicodeError):  # a name that cannot be written in ASCII
        good = False
    if not good:
        raise ServeError(
            f"--url {url!r} is no address of a server; give one like http://127.0.0.1:8000 (ports end at "
            f"65535)"
        )
    return url


class Endpoint:
    """A server under test. Raises ServeError for an address or a key that cannot be sent."""

    def __init__(self, url: str, api_key: str | None, settings: LoadSettings) -> None:
        self.url = _checked(url).rstrip("/").removesuffix("/v1")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ServeError(
                f"--api-key for {self.url} has characters that no HTTP header may have; give printable ASCII"
            )
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
        self._http = httpx.AsyncClient(
            headers=headers, timeout=settings.timeout, limits=limits, trust_env=False
        )
        self._settings = settings
        self.model = ""

    async def prepare(self) -> None:
        """Find the served model. Raises ServeError when the server does not answer as expected."""
        try:
            response = await self._http.get(self.url + "/v1/models")
            response.raise_for_status()
            self.model = response.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ServeError(
                f"{self.url}: /v1/models does not answer: {error}; is the server up, the key right?"
            ) from error

    async def counters(self) -> dict[str, float]:
        """Counters of speculation from /metrics (draftkit, vLLM, llama-server names); empty where there are
        none that can be read."""
        try:
            return _speculation_counters((await self._http.get(self.url + "/metrics")).text)
        except (httpx.HTTPError, ValueError, LookupError):  # the last two: no Prometheus text
            return {}

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ask(self, prompt: str) -> Record:
        """One streamed chat completion, measured. Never raises: what went wrong is in `error`."""
        settings = self._settings
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "ignore_eos": settings.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "return_spec_stats": True,
            **settings.extra,
        }
        record = Record(time.perf_counter())
        try:
            async with self._http.stream("POST", self.url + "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    record.error = (
                        f"{response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
                    )
                    return record
                last = record.sent
                async for line in _lines(response):
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data.startswith("{"):
                        last = self._take(record, json.loads(data), last)
                    record.ended = record.ended or data == "[DONE]"
            record.done = time.perf_counter()
            _share_gaps(record)
            if not record.ended:  # a connection that ends without a length looks the same, complete or not
                record.error = record.error or "the stream ended early"
            elif record.first is None:
                record.error = record.error or "the answer had no tokens"
        # chunks may be anything
        except (httpx.HTTPError, ValueError, AttributeError, LookupError, TypeError) as error:
            record.error = f"{type(error).__name__}: {error}"
        return record

    @staticmethod
    def _take(record: Record, chunk: dict[str, Any], last: float) -> float:
        """Fold one chunk into the record; returns the time of the last chunk that brought tokens."""
        now = time.perf_counter()
        if chunk.get("error"):  # some servers send null in every chunk
            record.error = str(chunk["error"])
            return now
        record.prompt_tokens = _count(chunk.get("usage"), "prompt_tokens") or record.prompt_tokens
        told = _count(chunk.get("usage"), "completion_tokens")
        metrics = chunk.get("metrics") or {}
        record.speculation = metrics.get("speculative_decoding") or record.speculation
        choices = chunk.get("choices") or []
        delta = choices[0].get("delta") or {} if choices else {}
        record.ended = record.ended or bool(choices and choices[0].get("finish_reason"))
        text = (
            delta.get("content")
            or delta.get("reasoning_content")
            or delta.get("reasoning")
            or delta.get("tool_calls")
        )
        before = record.output_tokens
        total = before + (1 if text else 0) if told is None else told
        if text or told is not None:
            # the last one decides: a usage counts all tokens before it too
            record.usage_told = told is not None
        record.guessed = record.guessed or (bool(text) and told is None)
        record.output_tokens = max(before, total)
        # A usage after chunks without one counts their tokens too: how many came with this chunk, nobody has
        # told.
        came = int(bool(text)) if record.guessed else total - before
        if not choices or came <= 0:
            return last
        record.chunks += 1
        if record.first is None:
            record.first = now
        else:
            record.gaps += [(now - last) / came] * came
        return now


def _count(usage: Any, name: str) -> int | None:
    """A count in a usage; None where there is none or it is not a whole number."""
    value = usage.get(name) if isinstance(usage, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return int(value) if value >= 0 and value % 1 == 0 else None


def _speculation_counters(text: str) -> dict[str, float]:
    """Totals of speculation in Prometheus text, summed over labels. Raises ValueError or LookupError for
    other text."""
    ours = "\n".join(
        line for line in text.split("\n") if "spec_decode_num_" in line and not line.startswith("#")
    )
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            short = sample.name.split(":")[-1]
            if short.startswith("spec_decode_num_") and short.endswith("_total") and "per_pos" not in short:
                found[short] = found.get(short, 0.0) + sample.value
    return found


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of server-sent events, which end in CR, LF or both. httpx's own lines end at U+2028, U+0085
    and others too, which may stand inside an event. Between CR and LF there is an empty line, which says
    nothing here.
    """
    rest = b""
    async for piece in response.aiter_bytes():
        *whole, rest = re.split(rb"[\r\n]", rest + piece)
        for line in whole:
            yield line.decode(errors="replace")
    yield rest.decode(errors="replace")


def _share_gaps(record: Record) -> None:
    """Where only the end of a stream told how many tokens its chunks held, all tokens get the mean gap."""
    if record.guessed and record.chunks == len(record.gaps) + 1 < record.output_tokens:
        count = record.output_tokens - 1
        record.gaps = [sum(record.gaps) / count] * count


async def run_load(
    endpoint: Endpoint, settings: LoadSettings, tick: Callable[[], None] = lambda: None
) -> tuple[list[Record], float, dict[str, float]]:
    """Warm up, then measure. Returns the records, the wall seconds, and the growth of the server's counters.

    Prompts and arrival times depend on the seed alone, so two servers get the same load.
    """
    order = random.Random(settings.seed)
    prompts = [order.choice(settings.prompts) for _ in range(settings.requests)]
    warm = asyncio.Semaphore(settings.concurrency)
    await asyncio.gather(
        *(_within(warm, endpoint.ask(order.choice(settings.prompts))) for _ in range(settings.warmup))
    )
    before = await endpoint.counters()
    began = time.perf_counter()
    if settings.rate is None:
        records = await _closed_loop(endpoint, prompts, settings.concurrency, tick)
    else:
        records = await _poisson(endpoint, prompts, settings, order, tick)
    seconds = time.perf_counter() - began
    after = await endpoint.counters()
    return records, seconds, {name: value - before.get(name, 0.0) for name, value in after.items()}


async def _within(limit: asyncio.Semaphore, work: Awaitable[Record]) -> Record:
    async with limit:
        return await work


async def _closed_loop(
    endpoint: Endpoint, prompts: Sequence[str], users: int, tick: Callable[[], None]
) -> list[Record]:
    left = iter(prompts)
    records: list[Record] = []

    async def user() -> None:
        for prompt in left:
            records.append(await endpoint.ask(prompt))
            tick()

    await asyncio.gather(*(user() for _ in range(min(users, len(prompts)))))
    return records


async def _poisson(
    endpoint: Endpoint,
    prompts: Sequence[str],
    settings: LoadSettings,
    order: random.Random,
    tick: Callable[[], None],
) -> list[Record]:
    limit = asyncio.Semaphore(settings.concurrency)
    began = time.perf_counter()
    at = 0.0

    async def one(prompt: str, due: float) -> Record:
        async with limit:
            record = await endpoint.ask(prompt)
        record.sent = due  # waiting for a free connection is the load's doing and counts
        tick()
        return record

    tasks = []
    for prompt in prompts:
        at += order.expovariate(settings.rate or 1.0)
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(prompt, began + at)))
    return list(await asyncio.gather(*tasks))

"""What is sent to an OpenAI-compatible server, and what comes back.

Where a server gives token ids, prompts go to /v1/completions as the very ids of the prompt format and the ids
of the answer come back; elsewhere messages go to /v1/chat/completions and come back as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from draftkit.data.answers import NO_ROOM, Answer, Question, answer_limit
from draftkit.errors import ServeError
from draftkit.ops.sampling import combined_seed
from draftkit.settings import GenerateSettings
from draftkit.target.deepseek_v4_messages import fields_of
from draftkit.target.prompt_format import PromptFormat

TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_PROBE = [{"role": "user", "content": "Hello"}]
_UNKNOWN_LENGTH = 2**30


class TryElsewhere(Exception):
    """The server cannot answer now; `rest` is how long it asks for."""

    def __init__(self, reason: str, rest: float | None = None) -> None:
        super().__init__(reason)
        self.rest = rest


class WrongServer(Exception):
    """The server is not what it was taken for: nothing of it is used any more."""


@dataclass(frozen=True)
class Server:
    """What a server serves."""

    url: str
    model: str
    gives_ids: bool
    max_length: int


async def answer_of(
    client: httpx.AsyncClient,
    server: Server,
    question: Question,
    settings: GenerateSettings,
    shown: PromptFormat,
) -> Answer:
    """One answer. Raises TryElsewhere, WrongServer, or ServeError for a question that is refused."""
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
        raise TryElsewhere(f"{type(error).__name__} {error}".strip()) from error
    said = _body_of(response, question.key, server)
    if not server.gives_ids:
        _check_fields(said, question, server)
    choice = said["choices"][0]
    reason = str(choice.get("finish_reason") or "stop")
    if server.gives_ids:
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids:
            raise TryElsewhere("an answer came without its token ids")
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


def _check_fields(said: dict[str, Any], question: Question, server: Server) -> None:
    """Raise ServeError for the answer to DeepSeek-V4's fields of messages by a server that did not show them
    to its model: one that does not know them leaves them out."""
    counted, length = (said.get("usage") or {}).get("prompt_tokens"), len(question.prompt_ids)
    if counted != length and any(map(fields_of, question.messages)):
        raise ServeError(
            f"{server.url} shows its model {counted or 'an unknown number of'} tokens of conversation "
            f"{question.key}, where this recipe shows {length}: it may not know DeepSeek-V4's task, "
            "response_format and prefix; serve by draftkit, or remove them"
        )


def _message_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The assistant's message under the names that records have."""
    reasoning = raw.get("reasoning_content") or raw.get("reasoning")
    found = {"role": "assistant", "content": raw.get("content")}
    found |= {"reasoning_content": reasoning, "tool_calls": raw.get("tool_calls")}
    return {k: v for k, v in found.items() if v or k in ("role", "content")}


def _body_of(response: httpx.Response, key: str, server: Server) -> dict[str, Any]:
    """What a server answered. Raises TryElsewhere for what passes, WrongServer for what does not,
    ServeError for a question that no server would take."""
    code = response.status_code
    if code == 429 or code >= 500:
        raise TryElsewhere(f"answers {code}", _retry_after(response))
    try:
        said = response.json()
    except ValueError:
        raise TryElsewhere(f"answers {code} with something else than JSON: {response.text[:60]!r}") from None
    if code in (401, 403, 404):
        raise WrongServer(f"answers {code}: {_error_text(said)}")
    if code >= 400:
        raise ServeError(
            f"{server.url} refuses conversation {key} ({code}: {_error_text(said)}); change or remove it"
        )
    if not isinstance(said, dict) or not said.get("choices"):
        raise TryElsewhere(f"answers without choices: {str(said)[:60]!r}")
    if said.get("model", server.model) != server.model:
        raise WrongServer(f"answers as the model {said['model']!r}, was asked for {server.model!r}")
    return said


def _error_text(said: Any) -> str:
    error = said.get("error", said) if isinstance(said, dict) else said
    return " ".join(str(error.get("message", error) if isinstance(error, dict) else error).split())[:160]


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header; a date, or nonsense, counts as none."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def look_at(client: httpx.Client, url: str, model: str | None, shown: PromptFormat) -> Server:
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
        gives_ids = isinstance(given["choices"][0].get("token_ids"), list)
    except ServeError:
        gives_ids = False  # no completions, or none of token ids
    return Server(url, chosen, gives_ids, length if isinstance(length, int) else _UNKNOWN_LENGTH)


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

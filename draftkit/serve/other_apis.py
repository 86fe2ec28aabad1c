"""OpenAI's Responses and Anthropic's Messages: a request becomes a chat, and the chat's answer is written in
the API's own form. Everything between is the chat's path, with its limits."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from draftkit.serve import anthropic_body, generate, responses_body
from draftkit.serve.anthropic_body import MessagesBody
from draftkit.serve.anthropic_wire import AnthropicWire
from draftkit.serve.problem import ApiError
from draftkit.serve.responses_body import ResponsesBody
from draftkit.serve.responses_wire import ResponsesWire
from draftkit.serve.settings import ServeSettings
from draftkit.serve.stream import body_size, read_body, unless_long
from draftkit.serve.worker import Worker


async def responses(request: Request, worker: Worker, settings: ServeSettings) -> Response:
    """POST /v1/responses."""
    body = await read_body(request, ResponsesBody, settings.max_body_bytes)
    texts = worker.ready().texts
    wire = ResponsesWire(body, lambda text: len(texts.encode(text, False)))
    try:
        chat = await unless_long(body_size(request), body.chat)
        return await generate.chat(request, worker, settings, chat, wire)
    except ApiError as error:
        raise error.renamed(responses_body.CHAT_NAMES) from None


async def messages(request: Request, worker: Worker, settings: ServeSettings) -> Response:
    """POST /v1/messages."""
    body = await read_body(request, MessagesBody, settings.max_body_bytes)
    try:
        chat = await unless_long(body_size(request), body.chat)
        return await generate.chat(request, worker, settings, chat, AnthropicWire())
    except ApiError as error:
        raise error.renamed(anthropic_body.CHAT_NAMES) from None

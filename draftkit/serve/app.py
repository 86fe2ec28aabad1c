"""The HTTP application: routes, and which errors become which bodies."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from draftkit import __version__
from draftkit.serve import generate, other_apis
from draftkit.serve.anthropic_body import CountBody, MessagesBody
from draftkit.serve.detokenize import token_name
from draftkit.serve.limits import MAX_COUNTED, check_fits
from draftkit.serve.metrics import ServerMetrics
from draftkit.serve.middleware import Envelope
from draftkit.serve.params import chat_prompt, chat_prompts, check_ids, check_model
from draftkit.serve.problem import MESSAGES, ApiError, error_body, shorten
from draftkit.serve.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from draftkit.serve.responses_body import ResponsesBody
from draftkit.serve.settings import ServeSettings
from draftkit.serve.stream import body_size, read_body, unless_long
from draftkit.serve.worker import Served, Worker
from draftkit.target.deepseek_v4_prompts import EFFORTS, DeepseekFormat

_STATIC = Path(__file__).parent / "static"
_FILES = {"": "index.html", "chat.css": "chat.css", "chat.js": "chat.js"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    MESSAGES: MessagesBody,
    f"{MESSAGES}/count_tokens": CountBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


def create_app(worker: Worker, metrics: ServerMetrics, settings: ServeSettings) -> FastAPI:
    """The application around a worker that is not started yet; it starts and stops with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, worker.stop)

    app = FastAPI(title="draftkit", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Envelope, api_keys=settings.api_keys, most=settings.max_connections)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    _add_generation(app, worker, settings)
    _add_text(app, worker, settings)
    _add_state(app, worker, metrics, settings)
    _add_page(app)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, worker: Worker, settings: ServeSettings) -> None:
    """What makes text."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate.completions(request, worker, settings)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate.chat_completions(request, worker, settings)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await other_apis.responses(request, worker, settings)

    @app.post(MESSAGES)
    async def messages(request: Request) -> Response:
        return await other_apis.messages(request, worker, settings)


def _add_text(app: FastAPI, worker: Worker, settings: ServeSettings) -> None:
    """Text to tokens and back."""

    @app.post("/tokenize")
    async def tokens_of(request: Request) -> Response:
        body = await read_body(request, TokenizeBody, settings.max_body_bytes)
        served = worker.ready()
        check_model(body.model, served)
        made = await unless_long(body_size(request), _tokenized, body, served)
        return JSONResponse(made)

    @app.post(f"{MESSAGES}/count_tokens")
    async def tokens_of_messages(request: Request) -> Response:
        body = await read_body(request, CountBody, settings.max_body_bytes)
        served = worker.ready()
        check_model(body.model, served)
        return JSONResponse(await unless_long(body_size(request), _counted, body, served))

    @app.post("/detokenize")
    async def text_of(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, settings.max_body_bytes)
        served = worker.ready()
        check_model(body.model, served)
        check_ids(body.tokens, served, "tokens")
        return JSONResponse(
            {"prompt": await unless_long(body_size(request), served.texts.decode, body.tokens, False)}
        )


def _counted(body: CountBody, served: Served) -> dict[str, int]:
    """The answer to POST /v1/messages/count_tokens."""
    [prompt] = chat_prompts(body.chat(), served)
    return {"input_tokens": len(prompt)}


def _tokenized(body: TokenizeBody, served: Served) -> dict[str, Any]:
    """The answer to POST /tokenize. Raises ApiError 400 for texts that are much longer than the context."""
    longest = served.engine.info.max_length
    most = max(longest, MAX_COUNTED)
    if body.messages is not None:
        ids = chat_prompt(
            body.messages,
            served,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
            most_tokens=most,
        )
    else:
        text = body.prompt or ""
        check_fits(served.texts, [text], most)
        ids = served.texts.encode(text, body.add_special_tokens is not False)
    names = [token_name(served.texts, i) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": names}


def _add_state(app: FastAPI, worker: Worker, metrics: ServerMetrics, settings: ServeSettings) -> None:
    """What monitors and clients ask about the server itself."""
    started = _now()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(worker, started)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if not name:
            return await models()
        check_model(name, worker.ready())
        return _card(worker, started)

    @app.get("/health")
    async def health() -> Response:
        """200 while the process can work, also when it loads or drains; 503 once the engine has failed."""
        return JSONResponse({"status": worker.state}, 503 if worker.state in ("failed", "stopped") else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """200 only while requests are taken."""
        return JSONResponse({"status": worker.state}, 200 if worker.state == "ready" else 503)

    @app.get("/metrics")
    def scrape() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _add_page(app: FastAPI) -> None:
    """The chat page: three files from the package."""

    def page(name: str) -> Callable[[], Response]:
        kind, _ = mimetypes.guess_type(name)

        def send() -> Response:
            return Response((_STATIC / name).read_bytes(), headers=_PAGE_HEADERS, media_type=kind)

        return send

    for path, name in _FILES.items():
        app.add_api_route(f"/{path}", page(name), methods=["GET"], include_in_schema=False)


def _now() -> int:
    import time

    return int(time.time())


def _card(worker: Worker, started: int) -> dict[str, Any]:
    served = worker.ready()
    info = served.engine.info
    return {
        "id": served.name,
        "object": "model",
        "created": started,
        "owned_by": "draftkit",
        "root": served.name,
        "parent": None,
        "max_model_len": info.max_length,
        "gamma": info.gamma,
        **({"thinking": list(EFFORTS)} if isinstance(served.prompt_format, DeepseekFormat) else {}),
    }


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    request.state.problem = shorten(f"{error.param or ''} {error}".strip())
    return JSONResponse(error.body(request.url.path), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {shorten(request.url.path)}: {error.detail}"
    body = error_body(error.status_code, message, path=request.url.path)
    return JSONResponse(body, error.status_code, error.headers)


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description: FastAPI's own, and the bodies that we read ourselves."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        kinds = list(dict.fromkeys(_BODIES.values()))
        refs, defs = models_json_schema(
            [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(defs.get("$defs", {}))
        for path, kind in _BODIES.items():
            schema["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": refs[(kind, "validation")]}},
            }
        app.openapi_schema = schema
    return app.openapi_schema

"""What the server answers when a request cannot be served: one status code, one body shape, as vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from draftkit.errors import ServeError

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "TooManyRequestsError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


_ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
MESSAGES = "/v1/messages"  # Anthropic's routes, whose clients read Anthropic's errors


class Refusal(ValueError):
    """What a body's validators raise: the message says all, `field` is what the client must change."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ApiError(ServeError):
    """A request ends with `status` and a body that names the wrong field (`param`), when there is one."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers or {}

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same error in the words of an API that calls fields otherwise."""
        message, param = str(self), self.param
        if param is not None and param in names:
            message, param = message.replace(param, names[param]), names[param]
        return ApiError(self.status, message, param, self.headers)

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON body for a route: {"error": {message, type, param, code}}, or Anthropic's."""
        return error_body(self.status, str(self), self.param, path)


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_body(status: int, message: str, param: str | None = None, path: str = "") -> dict[str, Any]:
    """{"error": {message, type, param, code}} for an HTTP status; Anthropic's form on its routes."""
    if path.startswith(MESSAGES):
        return anthropic_error(status, message)
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400: the client must change the request."""
    return ApiError(400, message, param)


def from_validation(error: ValidationError) -> ApiError:
    """The first mistake that pydantic found, as a 400 that names the dotted field."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {first['msg']}")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Refusal):
        return bad_request(shorten(str(cause), 1000), cause.field)
    # In unions pydantic says which branch it tried, as dict[str,any].
    field = shorten(".".join(str(part) for part in first["loc"] if "[" not in str(part))) or None
    message = shorten(first["msg"].removeprefix("Value error, "), 1000)
    more = error.error_count() - 1
    where = f"{field}: " if field else ""
    return bad_request(where + message + (f" (and {more} more)" if more else ""), field)


def shorten(text: str, limit: int = 200) -> str:
    """What a client wrote, cut to a length that a log line or an error can hold."""
    return text if len(text) <= limit else text[:limit] + "..."


def printable(text: str) -> str:
    """A text for a log: line ends, colours and what turns the direction of writing show as their escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )

"""What the operator of a server decides, and who loads one: the defaults of `draftkit serve` and `draftkit
bench`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from draftkit.errors import ServeError

_OPTIONS = {"max_body_bytes": "--max-body", "kv_bytes": "--kv-gib"} | {
    name: f"--{name.replace('_', '-')}"
    for name in ("drain_seconds", "dtype", "generation_config", "max_length", "max_running", "max_waiting")
}


@dataclass(frozen=True)
class ServeSettings:
    """Address, access and limits. Raises ServeError on values that cannot work.

    Attributes:
        host: address to bind; loopback unless told otherwise.
        port: TCP port; 0 lets the system choose one (it is in the log).
        api_keys: any of these opens all routes but those of monitors and the page (docs/security.md);
          empty = open.
        max_body_bytes: larger bodies get 413.
        max_waiting: answers beyond those that the engine makes at the same time; more get 429 with
          Retry-After.
        max_choices: prompts times n in one request; more get 400.
        max_connections: where there are more, the one that has been idle for longest is closed.
        drain_seconds: how long running requests may take to finish after SIGTERM.
        generation_config: "auto" = sampling fields that a request leaves out come from the target's
            generation_config.json; "none" = from the API's defaults.
        allow_origins: web pages of these origins ("https://example.com", or "*" for all) may ask, by CORS.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_waiting: int = 512
    max_choices: int = 256
    max_connections: int = 4096
    drain_seconds: float = 120.0
    generation_config: str = "auto"
    allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ServeError(f"port is {self.port}; allowed are 0 to 65535")
        for name in ("max_body_bytes", "max_waiting", "max_choices", "max_connections"):
            if getattr(self, name) < 1:
                raise ServeError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 <= self.drain_seconds < math.inf:
            raise ServeError(f"drain_seconds is {self.drain_seconds:g}; give seconds, 0 or more")
        if self.generation_config not in ("auto", "none"):
            raise ServeError(f"generation_config is {self.generation_config!r}; choose auto or none")
        if any(not key.strip() for key in self.api_keys):
            raise ServeError("an API key is empty; give a text or leave --api-key out")


@dataclass(frozen=True)
class LoadSettings:
    """What is sent, and how. `rate` None: closed loop, each of `concurrency` users sends its next request
    when its last is answered; else arrivals are a Poisson process of `rate` requests per second,
    `concurrency` at most in flight. Raises ServeError on values that cannot work; it names them as the
    options of `draftkit bench`.
    """

    prompts: tuple[str, ...]
    requests: int = 64
    warmup: int = 4
    concurrency: int = 1
    rate: float | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0
    timeout: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ServeError("there are no prompts to send; give a file with at least one conversation")
        for name, least in (("requests", 1), ("concurrency", 1), ("max_tokens", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ServeError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more"
                )
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ServeError(f"--rate is {self.rate:g}; it must be a number of requests per second above 0")
        if not 0 <= self.temperature < math.inf:
            raise ServeError(f"--temperature is {self.temperature:g}; it must be a number, 0 or more")


def switches_of(given: Iterable[str]) -> dict[str, Any]:
    """Variables of a chat template from NAME=VALUE, values as in YAML (`false` is no text). Raises
    ServeError."""
    import yaml  # the command line's help does without it

    found: dict[str, Any] = {}
    for one in given:
        name, separator, value = one.partition("=")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            separator = ""
        if not separator or not name.strip():
            raise ServeError(f"--template-switch {one}: give NAME=VALUE, as in enable_thinking=false")
    return found


@contextmanager
def option_names() -> Iterator[None]:
    """Inside, a ServeError about settings names them as `draftkit serve` does: its options."""
    try:
        yield
    except ServeError as error:
        names = "|".join(rf"\b{name}\b" for name in _OPTIONS)
        raise ServeError(re.sub(names, lambda found: _OPTIONS[found[0]], str(error))) from error

"""What goes into the engine and what comes out: plain data, no torch.

Names and defaults of `SamplingParams` are vLLM's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from draftkit.errors import DataError

FinishReason = str  # "stop", "length" or "abort"


class Constraint(Protocol):
    """A grammar that says which tokens may follow; its state is the tokens accepted so far."""

    @property
    def finished(self) -> bool:
        """Nothing may follow any more."""
        ...

    def allowed(self) -> Any:
        """Bool tensor [V]: tokens that may come next."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by one token; False, and nothing changes, when it is not allowed."""
        ...

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is made. Raises DataError on values that cannot work.

    Stop strings, `n` above 1 and special tokens in the text are the business of `LLM` and the server; the engine works
    on token ids. `max_tokens` None means all the room that the context leaves. A request with `temperature` above 0
    and a `seed` gives the same tokens in any batch. `draft` False decodes without speculation.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    draft: bool = True
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise DataError(f"{name} is {getattr(self, name)}; allowed is {allowed}")

        need(self.n >= 1, "n", "1 or more")
        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more, or None")
        need(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more")
        need(0 < self.top_p <= 1, "top_p", "above 0 up to 1")
        need(self.top_k >= -1, "top_k", "-1 or 0 (off) or more")
        need(0 <= self.min_p <= 1, "min_p", "0 to 1")
        need(-2 <= self.presence_penalty <= 2, "presence_penalty", "-2 to 2")
        need(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "-2 to 2")
        need(math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "above 0")
        need(self.min_tokens >= 0, "min_tokens", "0 or more")
        need(self.logprobs is None or self.logprobs >= 0, "logprobs", "0 or more, or None")


@dataclass(frozen=True)
class TokenEvent:
    """One token of an answer: drafted and accepted, or made by the target. Log probabilities are natural logarithms
    under the target's own distribution, before penalties and temperature, as vLLM reports them."""

    token_id: int
    origin: str  # "accepted" or "target"
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestStats:
    """Counts and seconds of one answer so far; `accepted_per_position[i]` counts rounds that kept draft i + 1."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    accepted_per_position: tuple[int, ...] = ()
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class StepOutput:
    """What one step added to one answer; `rejected` are the verified drafts of this round that were not kept."""

    request_id: str
    events: tuple[TokenEvent, ...]
    rejected: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    stats: RequestStats

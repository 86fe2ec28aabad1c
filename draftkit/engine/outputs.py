"""What the engine gives back: tokens, log probabilities, counts. No torch."""

from __future__ import annotations

from dataclasses import dataclass

FinishReason = str  # "stop" or "length"


@dataclass(frozen=True)
class TokenEvent:
    """One token of an answer: drafted and accepted, or made by the target. Log probabilities are natural
    logarithms under the target's own distribution, before penalties and temperature, as vLLM reports them."""

    token_id: int
    origin: str  # "accepted" or "target"; "prompt" where a prompt is shown
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptToken:
    """One token of a prompt, given those before it, under the target's own distribution: natural logarithms
    of probabilities; `rank` 1 is the most likely token."""

    token_id: int
    logprob: float
    rank: int
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestStats:
    """Counts and seconds of one answer so far; `accepted_per_position[i]` counts rounds that kept draft i +
    1."""

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
    """What one step added to one answer; `rejected` are the verified drafts of this round that were not kept.
    `prompt` comes with the first output of a request that asked for it: the prompt's tokens from the second
    on. `stop_token`: the last event is a token that ended the answer and is no part of its text."""

    request_id: str
    events: tuple[TokenEvent, ...]
    rejected: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    stats: RequestStats
    prompt: tuple[PromptToken, ...] | None = None
    stop_token: bool = False

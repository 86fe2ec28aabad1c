"""What goes into the engine and what comes out: plain data, no torch.

Names and defaults of `SamplingParams` are vLLM's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

from draftkit.errors import DataError

_LEAST = {"n": 1, "max_tokens": 1, "top_k": -1, "min_tokens": 0, "logprobs": 0, "prompt_logprobs": 0}
_RANGES = {
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-6, 1e6),
}
_LARGEST_BIAS = 1e20  # with the least penalty and temperature logits stay below float32's largest number
_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs")
_LEAST_TEMPERATURE = 1e-5  # below it logits over temperature leave float32


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

    Stop strings, `n` above 1 and special tokens in the text are the business of `LLM` and the server; the
    engine works on token ids. So they turn `bad_words`, which the answer is not to have, into
    `bad_token_ids`: sequences of tokens whose last one never follows the others, unless nothing else may.
    `max_tokens` None means all the room that the context leaves. A request with `temperature` above 0 and a
    `seed` gives the same tokens in any batch (but for rounding where PyTorch operations draft, see
    docs/passes.md). `draft` False decodes without speculation. `prompt_logprobs` asks for the log probability
    of every token of the prompt but the first, with that many of the most likely ones; such a prompt is read
    whole, whatever is known of it. As in vLLM, `stop` may be one string, and lists and None are taken where
    there are tuples.
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
    bad_words: tuple[str, ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    draft: bool = True
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            self._need(value is None or isinstance(value, Iterable), name, "a list")
            if value is not None or name != "allowed_token_ids":
                self._set(name, (value,) if isinstance(value, str) else tuple(() if value is None else value))
        self._check_numbers()
        for name in ("stop", "bad_words"):
            self._need(
                all(isinstance(text, str) and text for text in getattr(self, name)),
                name,
                "strings that are not empty",
            )
        for name in ("stop_token_ids", "allowed_token_ids"):
            self._need(all(map(_is_whole, getattr(self, name) or ())), name, "token ids")
        words = self.bad_token_ids if isinstance(self.bad_token_ids, Sequence) else (None,)
        ids = all(isinstance(word, Sequence) and word and all(map(_is_whole, word)) for word in words)
        self._need(ids, "bad_token_ids", "sequences of token ids")
        if self.logit_bias is not None:
            self._need(isinstance(self.logit_bias, Mapping), "logit_bias", "numbers by token id")
            biases = {token: _number(bias) for token, bias in self.logit_bias.items()}
            good = all(_is_whole(token) and abs(bias) <= _LARGEST_BIAS for token, bias in biases.items())
            self._need(
                good, "logit_bias", f"numbers from -{_LARGEST_BIAS:g} to {_LARGEST_BIAS:g} by token id"
            )
            self._set("logit_bias", {int(token): bias for token, bias in biases.items()})
        parts = ("finished", "allowed", "accept", "rollback")
        is_grammar = self.constraint is None or all(hasattr(self.constraint, part) for part in parts)
        self._need(is_grammar, "constraint", f"an object with {', '.join(parts)}, or None")
        if self.constraint is not None and self.allowed_token_ids is not None:
            raise DataError(
                "a constraint and allowed_token_ids may leave no token to choose; give one of them"
            )

    @property
    def adjusts(self) -> bool:
        """Whether anything but temperature, top-k, top-p and min-p shapes the distribution."""
        ids = self.allowed_token_ids is not None or self.bad_token_ids or self.logit_bias
        return bool(ids or self.min_tokens or self.penalises or self.constraint is not None)

    @property
    def penalises(self) -> bool:
        """Whether tokens that are there already change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def of_answer(
        self, index: int, max_tokens: int | None, constraint: Constraint | None = None
    ) -> SamplingParams:
        """The parameters of answer `index` of those that one request wants, without checking all again: seeds
        in a row, a constraint of its own, and the prompt is scored once. `max_tokens` None, or at least 1 and
        `min_tokens`."""
        other = copy.copy(self)
        other._set("max_tokens", max_tokens)
        other._set("constraint", constraint)
        if index:
            other._set("seed", None if self.seed is None else (self.seed + index) % 2**63)
            other._set("prompt_logprobs", None)
        return other

    def _check_numbers(self) -> None:
        """Numbers of any kind (NumPy's too) become Python's own."""
        for name, least in _LEAST.items():
            value, optional = getattr(self, name), name in _OPTIONAL
            good = optional if value is None else _is_whole(value) and value >= least
            self._need(good, name, f"a whole number from {least} on" + ", or None" * optional)
            self._set(name, None if value is None else int(value))
        self._need(self.seed is None or _is_whole(self.seed), "seed", "a whole number, or None")
        self._set("seed", None if self.seed is None else int(self.seed))
        short = self.max_tokens is None or self.min_tokens <= self.max_tokens
        self._need(short, "min_tokens", f"up to max_tokens, which is {self.max_tokens}")
        for name, (lowest, highest) in _RANGES.items():
            number = _number(getattr(self, name))
            self._need(lowest <= number <= highest, name, f"a number from {lowest:g} to {highest:g}")
            self._set(name, number)
        warm = math.isfinite(self.temperature) and self.temperature >= _LEAST_TEMPERATURE
        self._need(
            self.temperature == 0 or warm, "temperature", f"0 (greedy) or {_LEAST_TEMPERATURE:g} and more"
        )
        self._need(self.top_p > 0, "top_p", "above 0 up to 1")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _need(self, good: bool, name: str, allowed: str) -> None:
        if not good:
            raise DataError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: object) -> float:
    """As a float; NaN, which is in no range, for what is no number or too large for one."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan

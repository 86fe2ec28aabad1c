"""A constraint that keeps its errors to its own request: other requests are in the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from draftkit.engine.sampling_params import Constraint

T = TypeVar("T")


class Guarded:
    """The constraint, until it raises; from then on it is finished, which ends its answer, and `error` says
    why."""

    def __init__(self, constraint: Constraint, vocab_size: int) -> None:
        self._constraint, self._vocab_size = constraint, vocab_size
        self.error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Nothing may follow any more."""
        return self._ask(lambda: self._constraint.finished, True)

    def allowed(self) -> Any:
        """Bool tensor [V]: tokens that may come next."""
        found = self._ask(self._constraint.allowed, None)
        return torch.ones(self._vocab_size, dtype=torch.bool) if found is None else found

    def accept(self, token: int) -> bool:
        """Go on by one token; False, and nothing changes, when it is not allowed."""
        return self._ask(lambda: self._constraint.accept(token), False)

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        self._ask(lambda: self._constraint.rollback(count), None)

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        if self.error is None:
            try:
                return question()
            except Exception as error:
                self.error = error
        return otherwise

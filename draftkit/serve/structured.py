"""Answers that must be JSON: a grammar (llguidance) tells, token by token, what may follow.

llguidance reads JSON Schema and refuses keywords that it cannot enforce, so an answer that ends by itself validates. It
is a wheel of 3 MB that needs nothing else; xgrammar, the other common choice, brings 1 GB of Triton to Linux.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from draftkit.serve.problem import bad_request
from draftkit.serve.protocol import ResponseFormat
from draftkit.serve.worker import Served

log = logging.getLogger("draftkit.serve")
_PARAM = "response_format"
# Between the parts of JSON: a space or nothing. Without a bound small models never stop.
_SPACES: Any = {"whitespace_pattern": " ?"}


def constraint_of(wanted: ResponseFormat | None, served: Served) -> GrammarConstraint | None:
    """The constraint of an answer that has not begun, or None where any text will do; takes milliseconds, and a second
    where the tokenizer is large and new. Raises ApiError 400 when the schema is not one, or has keywords that cannot be
    enforced."""
    if wanted is None or wanted.type == "text":
        return None
    given = wanted.json_schema.schema_ if wanted.type == "json_schema" and wanted.json_schema is not None else None
    schema = given if given is not None else {"type": "object"}
    tokenizer = _token_table(served.tokenizer, served.engine.info.vocab_size)
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema, _SPACES), log_level=0)
    if matcher.is_error():
        line = " ".join(matcher.get_error().split())
        raise bad_request(f"response_format: this schema cannot be compiled: {line}", _PARAM)
    return GrammarConstraint(matcher, tokenizer.eos_tokens, served.engine.info.vocab_size)


@lru_cache(maxsize=1)
def _token_table(tokenizer: Any, vocab_size: int) -> LLTokenizer:
    """The bytes of every token, as llguidance keeps them. Raises ApiError 400 for a tokenizer that has no end token, or
    that is not of the `tokenizers` library."""
    from llguidance.hf import from_tokenizer

    if tokenizer.eos_token_id is None:
        raise bad_request("response_format: the target's tokenizer has no end token; ask for text", _PARAM)
    try:
        return from_tokenizer(tokenizer, vocab_size, tokenizer.eos_token_id)
    except ValueError as error:
        raise bad_request(f"response_format: cannot be had with the target's tokenizer ({error})", _PARAM) from error


class GrammarConstraint:
    """What may follow in one answer; the state is the tokens accepted so far.

    An engine asks `allowed()` before each token, calls `accept` for drafts as it walks through a proposal, and
    `rollback` for those that were rejected.
    """

    def __init__(self, matcher: LLMatcher, ends: list[int], vocab_size: int) -> None:
        self._matcher, self._ends, self._vocab_size = matcher, ends, vocab_size
        self.finished = False  # the answer is complete and its end token was taken: nothing may follow

    def copy(self) -> GrammarConstraint:
        """The same state, which goes on by itself: one for each choice of a request."""
        return GrammarConstraint(self._matcher.deep_copy(), self._ends, self._vocab_size)

    def allowed(self) -> Tensor:
        """bool [V]: tokens that may come next."""
        if self.finished:
            return torch.zeros(self._vocab_size, dtype=torch.bool)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        return torch.from_numpy(bits[: self._vocab_size].astype(np.bool_))

    def accept(self, token: int) -> bool:
        """Go on by one token; False when the grammar does not allow it, and nothing changes."""
        if self.finished:
            return False
        if token in self._ends:
            if self._matcher.is_error():  # a grammar outgrew llguidance's limits: its masks then allow the end alone
                log.warning("a JSON answer ends unfinished: %s", " ".join(self._matcher.get_error().split())[:200])
            self.finished = self._matcher.is_accepting()
            return self.finished
        return self._matcher.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""
        if count and self.finished:
            self.finished, count = False, count - 1
        if count:
            self._matcher.rollback(count)

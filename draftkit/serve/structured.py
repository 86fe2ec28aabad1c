"""Answers that must have a form: a grammar (llguidance) tells, token by token, what may follow.

llguidance reads JSON Schema and refuses keywords that it cannot enforce, so an answer that ends by itself
validates; it reads regular expressions and grammars as well. It is a wheel of 3 MB that needs nothing else;
xgrammar, the other common choice, brings 1 GB of Triton to Linux. A grammar is compiled here only after
another process has tried it (grammar_check.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from draftkit.serve.formats import ForcedCalls, Form, ResponseFormat, StructuredOutputs
from draftkit.serve.grammar_source import GrammarSource, source_of
from draftkit.serve.grammar_tester import GrammarTester
from draftkit.serve.problem import bad_request, shorten
from draftkit.serve.token_table import token_table
from draftkit.serve.worker import Served

log = logging.getLogger("draftkit.serve")
# characters of a schema, expression, grammar, list of choices or of functions, as JSON
MAX_FORM = 256 * 2**10
# of processor time for one token of one answer; what is tried before has less (grammar_check.py)
STEP_SECONDS = 0.25
_KNOWN = 64  # compiled grammars that are kept
_NAMES: dict[type[Any], tuple[str, str]] = {  # the field, and what it gives
    ResponseFormat: ("response_format", "schema"),
    StructuredOutputs: ("structured_outputs", "form"),
    ForcedCalls: ("tools", "schema"),
}


def constraint_of(wanted: Form | None, served: Served) -> GrammarConstraint | None:
    """The constraint of an answer that has not begun, or None where any text will do. A grammar that is not
    known yet takes milliseconds to seconds, and waits for its turn; call it in a thread. Raises ApiError: 400
    when the schema, expression or grammar is not one, has something in it that cannot be enforced, or is too
    large; 503 when too many wait."""
    if wanted is None or (isinstance(wanted, ResponseFormat) and not wanted.binds):
        return None
    param, what = _NAMES[type(wanted)]
    try:
        with _MAKING:  # the first requests come together, and each would start a process of its own
            grammars = _grammars(served.tokenizer, served.engine.info.vocab_size)
        matcher = grammars.matcher(source_of(wanted, served.prompt_format.call_form))
    except (ValueError, RecursionError) as error:
        message = shorten(" ".join(str(error).split()), 600)
        raise bad_request(f"{param}: this {what} cannot be compiled: {message}", param) from error
    return GrammarConstraint(matcher, grammars.table.eos_tokens, served.engine.info.vocab_size)


class Grammars:
    """The grammars of one tokenizer: those that are known, and two processes that try new ones: one that is
    done with each in a moment, and one for what takes longer, which waits for it alone.

    Raises ValueError for a tokenizer that has no end token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the target's tokenizer has no end token; ask for text")
        setup = {
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "vocab_size": vocab_size,
            "eos": tokenizer.eos_token_id,
        }
        self.table: LLTokenizer = token_table(*setup.values())
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._quick, self._slow = (GrammarTester(pace, setup) for pace in ("quick", "slow"))
        self.compile_seconds = 0.0  # of processor time, for the grammar that was tried last

    def matcher(self, source: GrammarSource) -> LLMatcher:
        """A matcher at its beginning. Raises ValueError saying why there is none, RecursionError, or ApiError
        503."""
        key = source.dump()
        if len(key) > MAX_FORM:
            raise ValueError(
                f"it has {len(key)} characters as JSON, and {MAX_FORM} are allowed; make it smaller"
            )
        if (known := self._known.get(key)) is not None:
            return known.deep_copy()
        for tester in (self._quick, self._slow):
            with tester.turn():  # meanwhile another request may have brought the same one
                known = self._known.get(key) or self._compiled(key, tester.ask(key))
            if known is not None:
                return known.deep_copy()
        raise ValueError("it takes too long to compile; make it smaller")

    def _compiled(self, key: str, answer: dict[str, Any]) -> LLMatcher | None:
        if "error" in answer:
            raise ValueError(answer["error"])
        if "slow" in answer:
            return None
        self.compile_seconds = answer["compile_seconds"]
        matcher = LLMatcher(self.table, answer["grammar"], log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        self._known[key] = matcher
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return matcher


_MAKING = threading.Lock()


@lru_cache(maxsize=1)
def _grammars(tokenizer: Any, vocab_size: int) -> Grammars:
    return Grammars(tokenizer, vocab_size)


class GrammarError(Exception):
    """An answer cannot go on by its grammar; the message says why."""


class GrammarConstraint:
    """What may follow in one answer; the state is the tokens accepted so far.

    An engine asks `allowed()` before each token, calls `accept` for drafts as it walks through a proposal,
    and `rollback` for those that were rejected. Raises GrammarError where the grammar outgrows llguidance's
    limits or takes too long: whoever hands this to an engine wraps it in `Guarded`, which ends the answer.
    """

    def __init__(self, matcher: LLMatcher, ends: list[int], vocab_size: int) -> None:
        self._matcher, self._ends, self._vocab_size = matcher, ends, vocab_size
        self._mask: np.ndarray | None = None  # bits of what may follow here, once somebody has asked
        self.finished = False  # the answer is complete and its end token was taken: nothing may follow

    def copy(self) -> GrammarConstraint:
        """The same state, which goes on by itself: one for each choice of a request."""
        return GrammarConstraint(self._matcher.deep_copy(), self._ends, self._vocab_size)

    def allowed(self) -> Tensor:
        """bool [V]: tokens that may come next."""
        if self.finished:
            return torch.zeros(self._vocab_size, dtype=torch.bool)
        began = time.thread_time()
        self._mask = np.unpackbits(
            np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little"
        )
        self._check(began)
        return torch.from_numpy(self._mask[: self._vocab_size].astype(np.bool_))

    def accept(self, token: int) -> bool:
        """Go on by one token; False when the grammar does not allow it, and nothing changes."""
        if self.finished:
            return False
        if token in self._ends:
            self.finished = self._matcher.is_accepting()
            return self.finished
        began, mask = time.thread_time(), self._mask
        taken = self._matcher.try_consume_tokens([token]) == 1
        self._check(began)
        if taken:
            self._mask = None
        elif mask is not None and mask[token]:
            raise GrammarError(f"token {token} was allowed and then not taken")
        return taken

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""
        if count and self.finished:
            self.finished, count = False, count - 1
        if count:
            self._mask = None
            self._matcher.rollback(count)

    def _check(self, began: float) -> None:
        if self._matcher.is_error():
            raise GrammarError(" ".join(self._matcher.get_error().split())[:200])
        if (took := time.thread_time() - began) > STEP_SECONDS:
            raise GrammarError(
                f"one token took {took:.2f} s, more than {STEP_SECONDS:g} s; make the grammar smaller"
            )

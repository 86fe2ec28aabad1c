"""Answers that must have a form: a grammar (llguidance) tells, token by token, what may follow.

llguidance reads JSON Schema and refuses keywords that it cannot enforce, so an answer that ends by itself validates; it reads
regular expressions and grammars as well. It is a wheel of 3 MB that needs nothing else; xgrammar, the other common choice,
brings 1 GB of Triton to Linux.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from draftkit.serve.formats import ForcedCalls, Form, ResponseFormat, StructuredOutputs
from draftkit.serve.problem import bad_request
from draftkit.serve.tools import CLOSE, OPEN
from draftkit.serve.worker import Served

log = logging.getLogger("draftkit.serve")
# Between the parts of JSON: a space or nothing. Without a bound small models never stop.
_SPACES: Any = {"whitespace_pattern": " ?"}


_NAMES: dict[type[Any], tuple[str, str]] = {  # the field, and what it gives
    ResponseFormat: ("response_format", "schema"),
    StructuredOutputs: ("structured_outputs", "form"),
    ForcedCalls: ("tools", "schema"),
}


def constraint_of(wanted: Form | None, served: Served) -> GrammarConstraint | None:
    """The constraint of an answer that has not begun, or None where any text will do; takes milliseconds, and a second
    where the tokenizer is large and new. Raises ApiError 400 when the schema, expression or grammar is not one, or has
    something in it that cannot be enforced."""
    if wanted is None or (isinstance(wanted, ResponseFormat) and not wanted.binds):
        return None
    param, what = _NAMES[type(wanted)]
    try:
        tokenizer = _token_table(served.tokenizer, served.engine.info.vocab_size)
        grammar = _grammar_of(wanted)
    except Exception as error:  # json's and llguidance's readers raise what they like
        raise bad_request(f"{param}: {' '.join(str(error).split())}", param) from error
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise bad_request(f"{param}: this {what} cannot be compiled: {' '.join(matcher.get_error().split())}", param)
    return GrammarConstraint(matcher, tokenizer.eos_tokens, served.engine.info.vocab_size)


def _grammar_of(wanted: Form) -> str:
    schema: Any = {"type": "object"}
    if isinstance(wanted, ForcedCalls):
        return _calls(wanted)
    if isinstance(wanted, ResponseFormat):
        if wanted.type == "json_schema" and wanted.json_schema is not None:
            schema = wanted.json_schema.schema_
    elif wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    elif wanted.choice is not None:
        return _choice(wanted.choice)
    elif wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar))
    elif wanted.json_ is not None:
        schema = json.loads(wanted.json_) if isinstance(wanted.json_, str) else wanted.json_
    return LLMatcher.grammar_from_json_schema(schema, _SPACES)


def _choice(texts: list[str]) -> str:
    """One of these texts: each as a regular expression of itself, since texts in Lark cannot hold every character."""
    return LLMatcher.grammar_from_regex("|".join(f"(?:{_escaped(text)})" for text in texts))


def _escaped(text: str) -> str:
    """The regular expression of a text."""
    return "".join(f"\\x{{{ord(c):x}}}" if not c.isalnum() else c for c in text)


def _calls(wanted: ForcedCalls) -> str:
    """Tool calls as chat templates write them (see tools.py). Each function's parameters are a schema by themselves, whose
    references begin at its own root; a function without parameters takes none."""
    rules = [f"call: /{_escaped(OPEN)}/ \"\\n\" one \"\\n\" /{_escaped(CLOSE)}/"]
    rules.insert(0, 'start: call ("\\n" call)*' if wanted.many else "start: call")
    rules.append("one: " + " | ".join(f"function{i}" for i in range(len(wanted.functions))))
    for i, function in enumerate(wanted.functions):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        rules.append(f'function{i}: /{_escaped(head)}/ arguments{i} "}}"')
        rules.append(f"arguments{i}: %json {json.dumps({**schema, 'x-guidance': _SPACES})}")
    return LLMatcher.grammar_from_lark("\n".join(rules))


@lru_cache(maxsize=1)
def _token_table(tokenizer: Any, vocab_size: int) -> LLTokenizer:
    """The bytes of every token, as llguidance keeps them. Raises ValueError for a tokenizer that has no end token, or that is
    not of the `tokenizers` library."""
    from llguidance.hf import from_tokenizer

    if tokenizer.eos_token_id is None:
        raise ValueError("the target's tokenizer has no end token; ask for text")
    try:
        return from_tokenizer(tokenizer, vocab_size, tokenizer.eos_token_id)
    except ValueError as error:
        raise ValueError(f"cannot be had with the target's tokenizer ({error})") from error


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

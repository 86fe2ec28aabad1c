"""Answers that must be JSON: a grammar from xgrammar tells, token by token, what may follow."""

from __future__ import annotations

import json
from typing import Any

from draftkit.serve.problem import bad_request
from draftkit.serve.protocol import ResponseFormat
from draftkit.serve.worker import Served

_PARAM = "response_format"


def constraint_of(wanted: ResponseFormat | None, served: Served) -> GrammarConstraint | None:
    """A fresh constraint for one answer, or None where any text will do. Raises ApiError 400 when it cannot be had."""
    if wanted is None or wanted.type == "text":
        return None
    return compile_constraint(wanted, served)


def compile_constraint(wanted: ResponseFormat, served: Served) -> GrammarConstraint:
    """The grammar of a response format. Raises ApiError 400: xgrammar is not installed, or the schema is not for it."""
    try:
        import xgrammar
    except ImportError:
        raise bad_request(
            f"response_format {wanted.type} needs the package xgrammar on the server; "
            "its operator can add it with: pip install 'draftkit[structured]'",
            _PARAM,
        ) from None
    compiler = _compiler(xgrammar, served)
    try:
        if wanted.type == "json_object":
            grammar = compiler.compile_builtin_json_grammar()
        else:
            grammar = compiler.compile_json_schema(json.dumps(wanted.json_schema.schema_))  # type: ignore[union-attr]
    except Exception as error:  # xgrammar raises RuntimeError and its own kinds for schemas it does not know
        line = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise bad_request(f"response_format: this schema cannot be compiled: {line}", _PARAM) from error
    return GrammarConstraint(xgrammar, grammar, served.engine.info.vocab_size)


_COMPILERS: dict[int, Any] = {}


def _compiler(xgrammar: Any, served: Served) -> Any:
    """One compiler per tokenizer: it caches what it compiled."""
    key = id(served.tokenizer)
    if key not in _COMPILERS:
        info = xgrammar.TokenizerInfo.from_huggingface(served.tokenizer, vocab_size=served.engine.info.vocab_size)
        _COMPILERS[key] = xgrammar.GrammarCompiler(info, max_threads=1)
    return _COMPILERS[key]


class GrammarConstraint:
    """What may follow in one answer; the state is the tokens accepted so far.

    An engine asks `allowed()` before each token, calls `accept` for drafts as it walks through a proposal, and
    `rollback` for those that were rejected.
    """

    def __init__(self, xgrammar: Any, grammar: Any, vocab_size: int) -> None:
        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._vocab_size = vocab_size

    @property
    def finished(self) -> bool:
        """The grammar is complete and the end token was taken: nothing may follow."""
        return bool(self._matcher.is_terminated())

    def allowed(self) -> Any:
        """bool [V]: tokens that may come next."""
        import torch

        if self.finished:
            return torch.zeros(self._vocab_size, dtype=torch.bool)
        self._matcher.fill_next_token_bitmask(self._bitmask)
        bits = (self._bitmask[0].unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
        return bits.flatten()[: self._vocab_size].bool()

    def accept(self, token: int) -> bool:
        """Go on by one token; False when the grammar does not allow it, and nothing changes."""
        return not self.finished and bool(self._matcher.accept_token(token))

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""
        if count:
            self._matcher.rollback(count)

"""Grammars for JSON answers; needs xgrammar, which is an extra."""

from __future__ import annotations

import json

import pytest
from test_serve_fake_engine import fake_served

from draftkit.serve.problem import ApiError
from draftkit.serve.protocol import ResponseFormat
from draftkit.serve.structured import GrammarConstraint, compile_constraint

pytest.importorskip("xgrammar", reason="the extra is not installed: pip install 'draftkit[structured]'")

SERVED = fake_served()
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}


def grammar(schema: object | None = None) -> GrammarConstraint:
    given = {"type": "json_object"} if schema is None else {"type": "json_schema", "json_schema": {"schema": schema}}
    return compile_constraint(ResponseFormat.model_validate(given), SERVED)


def ids(text: str) -> list[int]:
    return list(SERVED.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_valid_json_is_allowed_token_by_token_and_then_only_the_end() -> None:
    constraint = grammar(SCHEMA)
    for token in ids('{"age": 42}'):
        assert constraint.allowed()[token] and constraint.accept(token)
    end = SERVED.tokenizer.eos_token_id
    assert constraint.allowed().nonzero().flatten().tolist() == [end]
    assert constraint.accept(end) and constraint.finished
    assert not constraint.allowed().any() and not constraint.accept(end)


def test_what_the_schema_forbids_is_refused_and_changes_nothing() -> None:
    constraint = grammar(SCHEMA)
    wrong = ids("x")[0]
    assert not constraint.allowed()[wrong] and not constraint.accept(wrong)
    assert constraint.accept(ids("{")[0])


def test_rejected_drafts_are_rolled_back() -> None:
    constraint = grammar(SCHEMA)
    tokens = ids('{"age": 1')
    for token in tokens:
        constraint.accept(token)
    before = constraint.allowed()
    drafts = ids("23}")
    assert all(constraint.accept(token) for token in drafts)
    constraint.rollback(len(drafts))
    assert (constraint.allowed() == before).all()
    constraint.rollback(0)


def test_always_taking_an_allowed_token_gives_json() -> None:
    constraint, text = grammar(SCHEMA), []
    for step in range(40):
        choices = constraint.allowed().nonzero().flatten().tolist()
        closing = [t for t in choices if t == SERVED.tokenizer.eos_token_id or "}" in SERVED.tokenizer.decode([t])]
        token = (closing or choices)[0 if closing else step % len(choices)]
        assert constraint.accept(token)
        if constraint.finished:
            break
        text.append(token)
    assert isinstance(json.loads(SERVED.tokenizer.decode(text))["age"], int)


def test_a_schema_that_cannot_be_compiled_is_a_400() -> None:
    with pytest.raises(ApiError, match="cannot be compiled") as caught:
        grammar({"type": "nonsense"})
    assert caught.value.status == 400

"""JSON answers: the grammar by itself, and the real server asked by the openai client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draftkit.serve.formats import ResponseFormat, StructuredOutputs
from draftkit.serve.problem import ApiError, from_validation
from draftkit.serve.protocol import CompletionBody
from draftkit.serve.structured import GrammarConstraint, constraint_of
from support.fake_engine import fake_served
from support.server import SERVE, serving

SERVED = fake_served()
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}


def grammar(schema: object | None = None) -> GrammarConstraint:
    given = (
        {"type": "json_object"}
        if schema is None
        else {"type": "json_schema", "json_schema": {"schema": schema}}
    )
    constraint = constraint_of(ResponseFormat.model_validate(given), SERVED)
    assert constraint is not None
    return constraint


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
    end = SERVED.tokenizer.eos_token_id
    for wrong in (ids("x")[0], end):
        assert not constraint.allowed()[wrong] and not constraint.accept(wrong) and not constraint.finished
    assert constraint.accept(ids("{")[0])


def test_rejected_drafts_are_rolled_back() -> None:
    constraint = grammar(SCHEMA)
    for token in ids('{"age": 1'):
        constraint.accept(token)
    before = constraint.allowed()
    drafts = [*ids("23}"), SERVED.tokenizer.eos_token_id]
    assert all(constraint.accept(token) for token in drafts) and constraint.finished
    constraint.rollback(len(drafts))
    assert (constraint.allowed() == before).all() and not constraint.finished
    constraint.rollback(0)
    assert (constraint.allowed() == before).all()


def test_copies_go_on_by_themselves() -> None:
    first = grammar(SCHEMA)
    second = first.copy()
    assert all(first.accept(token) for token in ids('{"age": 1'))
    assert (second.allowed() == grammar(SCHEMA).allowed()).all()


def test_always_taking_an_allowed_token_gives_json() -> None:
    constraint, text = grammar(SCHEMA), []
    for step in range(40):
        choices = constraint.allowed().nonzero().flatten().tolist()
        closing = [
            t for t in choices if t == SERVED.tokenizer.eos_token_id or "}" in SERVED.tokenizer.decode([t])
        ]
        token = (closing or choices)[0 if closing else step % len(choices)]
        assert constraint.accept(token)
        if constraint.finished:
            break
        text.append(token)
    assert isinstance(json.loads(SERVED.tokenizer.decode(text))["age"], int)


def test_a_json_object_is_an_object_and_text_needs_no_grammar() -> None:
    constraint = grammar()
    assert not constraint.allowed()[ids("[")[0]]
    assert all(
        constraint.accept(token) for token in [*ids('{"a": [1, null]}'), SERVED.tokenizer.eos_token_id]
    )
    assert constraint_of(ResponseFormat(type="text"), SERVED) is None


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-ahead"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_a_400_of_one_line(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(ApiError, match="cannot be compiled") as caught:
        grammar(schema)
    assert caught.value.status == 400 and named in str(caught.value) and "\n" not in str(caught.value)


ODD = 'a "quoted"\\n [x]* / ü\n'
FORMS = [
    ({"choice": ["yes", "no", ODD]}, ["yes", "no", ODD], ["maybe", "", "ye", "yesno"]),
    ({"regex": r"[a-c]{2}-\d+"}, ["ab-12", "cc-0"], ["ab-", "d", "aab-1"]),
    ({"grammar": 'root ::= "set " name\nname ::= [a-z]+'}, ["set x", "set abc"], ["set ", "set 1"]),
    ({"grammar": 'start: "set " NAME\nNAME: /[a-z]+/'}, ["set x"], ["set X"]),
    ({"json": {"type": "integer"}}, ["42"], ["4.2", "x"]),
    ({"json": '{"type": "integer"}'}, ["-7"], ["{"]),
    ({"json": {}}, ["42", "[1]"], ["x"]),
    ({"json_object": True, "json": None}, ['{"a": [1]}'], ["[1]", "1"]),
]


def fits(given: dict[str, Any], text: str) -> bool:
    constraint = constraint_of(StructuredOutputs.model_validate(given), SERVED)
    assert constraint is not None
    return all(constraint.accept(token) for token in [*ids(text), SERVED.tokenizer.eos_token_id])


@pytest.mark.parametrize(
    ("given", "good", "bad"), FORMS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_vllms_structured_outputs_take_what_fits_and_nothing_else(
    given: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not fits(given, text)] == []
    assert [text for text in bad if fits(given, text)] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"regex": "("}, "cannot be compiled"),
        ({"regex": "a(?=b)"}, "cannot be compiled"),
        ({"grammar": "root ::= ("}, "structured_outputs: "),
        ({"grammar": "start: missing"}, "missing"),
        ({"json": "{"}, "structured_outputs: "),
        ({"json": {"type": "nonsense"}}, "nonsense"),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_had_is_a_400_of_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        fits(given, "")
    assert caught.value.status == 400 and message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs",
            "structural_tag is not supported",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "combined",
        ),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [5]}, "allowed_token_ids", "combined"),
    ],
    ids=str,
)
def test_forms_that_contradict_are_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"prompt": "a", **fields})
    error = from_validation(caught.value)
    assert (error.status, error.param) == (400, param) and message in str(error)


class Item(BaseModel):
    """Everything is bounded, so that any answer ends."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(max_length=6)
    count: int = Field(ge=0, le=99)
    kind: Literal["list", "tuple", "dict"]
    sizes: list[Literal[1, 2, 3]] = Field(min_length=1, max_length=3)
    done: bool


QUESTION = [{"role": "user", "content": "Write a function that adds two numbers."}]
WANTED = {
    "type": "json_schema",
    "json_schema": {"name": "item", "strict": True, "schema": Item.model_json_schema()},
}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving(command=SERVE) as server:
        assert any("drafter" in line and "none" not in line for line in server.log), "this server must draft"
        yield openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


def answer(client: openai.OpenAI, stream: bool, seed: int, **more: Any) -> str:
    made = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        response_format=WANTED,
        max_tokens=200,
        stream=stream,
        seed=seed,
        **more,
    )
    if not stream:
        assert made.choices[0].finish_reason == "stop"
        return str(made.choices[0].message.content)
    chunks = [chunk.choices[0] for chunk in made if chunk.choices]
    assert chunks[-1].finish_reason == "stop"
    return "".join(chunk.delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("draft", [True, False], ids=["drafting", "plain"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_answers_of_the_real_server_validate(
    client: openai.OpenAI, stream: bool, draft: bool, temperature: int
) -> None:
    ask = lambda seed: answer(client, stream, seed, temperature=temperature, extra_body={"draft": draft})  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(ask, range(4)))
    assert all(Item.model_validate_json(text) for text in texts)
    assert len(set(texts)) == 1 if temperature == 0 else len(set(texts)) > 2


def test_greedy_json_is_the_same_with_and_without_drafts(client: openai.OpenAI) -> None:
    texts = {answer(client, False, 0, temperature=0, extra_body={"draft": draft}) for draft in (True, False)}
    assert len(texts) == 1


def test_the_openai_client_parses_several_choices_into_a_model(client: openai.OpenAI) -> None:
    made = client.chat.completions.parse(
        model="tiny", messages=QUESTION, response_format=Item, n=3, max_tokens=200
    )
    assert (
        len({id(choice.message.parsed) for choice in made.choices if isinstance(choice.message.parsed, Item)})
        == 3
    )


def test_a_json_object_of_the_real_server_is_one_when_it_ends_by_itself(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        response_format={"type": "json_object"},
        max_tokens=100,
        n=8,
        seed=1,
        temperature=1.5,
    )
    ended = [choice.message.content for choice in made.choices if choice.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(text or ""), dict) for text in ended)


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_real_server_keeps_to_vllms_forms_with_drafts(client: openai.OpenAI, temperature: int) -> None:
    def ask(**form: Any) -> list[str]:
        more = {"structured_outputs": form, "return_spec_stats": True}
        made = client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=60,
            n=4,
            seed=3,
            temperature=temperature,
            extra_body=more,
        )
        assert all(c.finish_reason == "stop" for c in made.choices)
        return [c.message.content or "" for c in made.choices]

    assert set(ask(choice=["first", "second one"])) <= {"first", "second one"}
    assert all(re.fullmatch(r"[a-f]{3}-[0-9]{2}", text) for text in ask(regex="[a-f]{3}-[0-9]{2}"))
    assert all(text in ("2 + 2", "2 - 2") for text in ask(grammar='root ::= "2 " [+-] " 2"'))

"""Calls that are demanded of a DeepSeek-V4 target: DeepSeek's form, which its own parser reads back."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel, ConfigDict, Field

from draftkit.serve.call_grammar import dsml_calls
from draftkit.serve.grammar_source import GrammarSource, grammar_of
from draftkit.target.deepseek_v4_prompts import DeepseekFormat
from support.deepseek_v4 import tiny_folder
from support.server import SERVE, serving
from support.targets import TEXTS
from tools.tiny_v4 import v4_tokenizer


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Place(Strict):
    city: Literal["Köln", "Rome"]
    zone: int = Field(ge=0, le=9)


class Weather(Strict):
    """Texts as they are, with and without bounds that JSON alone can have, numbers, objects, references."""

    city: Literal["Köln", "Rome", "Oslo"]
    note: str = Field(max_length=6)
    code: str = Field(pattern="^[a-c]{2}$")
    days: int = Field(default=1, ge=0, le=9)
    wet: bool | None = None
    places: list[Place] = Field(default=[], max_length=2)


class Nothing(Strict):
    pass


FUNCTIONS: dict[str, type[BaseModel]] = {"weather": Weather, "now": Nothing}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}},
    {"type": "function", "function": {"name": "now"}},
]
DECLARED = [tool["function"] for tool in TOOLS]
PLAIN = {"thinking": False}
FORMAT = DeepseekFormat(v4_tokenizer(TEXTS), PLAIN)


def check(calls: Any) -> list[str]:
    """The names of the calls, each of which its function takes."""
    assert calls
    for call in calls:
        FUNCTIONS[call.function.name].model_validate_json(call.function.arguments)
    return [call.function.name for call in calls]


def written(functions: list[dict[str, Any]], many: bool, seed: int) -> str:
    """An answer of this form, byte by byte at random."""
    table, chance = LLTokenizer("byte"), random.Random(seed)
    matcher = LLMatcher(table, grammar_of(GrammarSource("calls", ["dsml", functions, many])), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    text = bytearray()
    while not matcher.is_accepting() and len(text) < 4000:
        mask = matcher.compute_bitmask()
        allowed = [b for b in range(256) if mask[b // 8] >> b % 8 & 1]
        plain = [b for b in allowed if 31 < b < 128 or b == 10] if len(allowed) > 60 else allowed
        text.append(chance.choice(plain))
        assert matcher.try_consume_tokens([text[-1]]) == 1
    return text.decode()


def parsed(text: str) -> list[dict[str, Any]]:
    reader = FORMAT.reader()
    parts = reader.add(text) + reader.finish()
    assert not parts.content.strip() and not parts.reasoning
    return [call["function"] for call in parts.tool_calls]


def test_whatever_the_grammar_lets_through_deepseeks_parser_reads_as_a_valid_call() -> None:
    seen = set()
    for seed in range(60):
        text = written(DECLARED, False, seed)
        [call] = parsed(text)
        FUNCTIONS[call["name"]].model_validate_json(call["arguments"])
        seen |= {call["name"], *json.loads(call["arguments"])}
    assert seen == {"weather", "now", *Weather.model_fields}


def test_what_deepseeks_encoder_writes_of_such_calls_is_let_through() -> None:
    """So a target that was taught the form is not led off it."""
    given = {"city": "Rome", "note": "a<b>\n", "days": 2, "wet": None}
    loose = [{"name": "weather", "parameters": json.loads(json.dumps(Weather.model_json_schema()))}]
    del loose[0]["parameters"]["properties"]["code"]
    loose[0]["parameters"]["required"].remove("code")
    calls = [
        {"id": str(i), "type": "function", "function": {"name": "weather", "arguments": json.dumps(given)}}
        for i in range(2)
    ]
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    text = (
        FORMAT.text([*said, {"role": "user", "content": "y"}]).partition("</think>")[2].partition("<｜end")[0]
    )
    matcher = LLMatcher(
        LLTokenizer("byte"), grammar_of(GrammarSource("calls", ["dsml", loose, True])), log_level=0
    )
    assert matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()
    assert [json.loads(call["arguments"]) for call in parsed(text)] == [given, given]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ({"name": 'a"b'}, "cannot be written in DeepSeek's form"),
        ({"name": "f", "parameters": {"properties": {"<x>": {}}}}, "cannot be written in DeepSeek's form"),
        ({"name": "f", "parameters": {"anyOf": []}}, "anyOf beside the parameters of f cannot be enforced"),
        ({"name": "f", "parameters": {"type": "array"}}, "the parameters of f are no object"),
        ({"name": "f", "parameters": {"properties": {"x": False}, "required": ["x"]}}, "can have no value"),
    ],
)
def test_what_cannot_be_enforced_is_named(function: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        grammar_of(GrammarSource("calls", ["dsml", [function], True]))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A server of a random tiny V4 and of the random module in its checkpoint."""
    folder = str(tiny_folder(tmp_path_factory.mktemp("v4") / "DeepSeek-V4-tiny"))
    with serving("--target", folder, "--drafter", folder, command=SERVE) as running:
        yield openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)


def ask(client: openai.OpenAI, seed: int, **fields: Any) -> Any:
    """At a temperature at which the target itself would write anything."""
    given = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 400, "temperature": 1.5} | fields
    messages: Any = [{"role": "user", "content": "Is it raining?"}]
    return client.chat.completions.create(model="", messages=messages, seed=seed, **given)


@pytest.mark.slow
def test_a_call_that_is_required_is_made_without_thinking(client: openai.OpenAI) -> None:
    """A step of this target takes tens of milliseconds on a CPU, so few tokens are asked for, and no
    drafts."""
    plain = {"extra_body": {"draft": False}}
    weather, now = TOOLS  # one of them: a random target likes one of the two alone
    answers = (ask(client, seed, parallel_tool_calls=False, tools=[weather], **plain) for seed in (1, 0, 2))
    choice = next((c for answer in answers if (c := answer.choices[0]).finish_reason != "length"), None)
    assert choice is not None, "all three answers are cut off"
    assert not getattr(choice.message, "reasoning_content", None)
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert check(choice.message.tool_calls) == ["weather"]
    chosen = {"type": "function", "function": {"name": "now"}}
    [choice] = ask(client, 0, tool_choice=chosen, **plain).choices
    assert choice.finish_reason == "stop" and check(choice.message.tool_calls) == ["now"]
    for seed in (3, 2, 1, 0):
        [many] = ask(client, seed, tools=[now], **plain).choices
        if many.finish_reason != "length" and len(check(many.message.tool_calls)) > 1:
            break
    else:
        raise AssertionError("of four answers none makes several calls")
    [one] = ask(client, seed, tools=[now], parallel_tool_calls=False, **plain).choices
    assert check(one.message.tool_calls) == ["now"], "which is one call where one alone is allowed"


@pytest.mark.slow
def test_a_stream_and_drafts_change_nothing_of_it(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "tools": TOOLS[1:]}
    told = []
    for draft in (True, False):
        [whole] = ask(client, 0, extra_body={"draft": draft}, **fields).choices
        calls = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or []]
        told.append((whole.message.content, calls))
    assert told[0] == told[1] and told[0][1]
    chunks = [c.choices[0] for c in ask(client, 0, stream=True, **fields) if c.choices]
    assert [
        (c.function.name, c.function.arguments) for one in chunks for c in one.delta.tool_calls or []
    ] == told[0][1]


def test_a_call_cannot_be_demanded_of_thought(client: openai.OpenAI) -> None:
    for fields in (
        {"reasoning_effort": "high"},
        {"extra_body": {"chat_template_kwargs": {"thinking": True}}},
    ):
        with pytest.raises(openai.BadRequestError, match="without thinking; leave reasoning_effort"):
            ask(client, 0, **fields)
    assert ask(client, 0, reasoning_effort="none", max_tokens=4).choices
    odd = {"type": "function", "function": {"name": "f", "parameters": {"anyOf": [{}]}}}
    with pytest.raises(openai.BadRequestError, match="anyOf beside the parameters of f"):
        ask(client, 0, tools=[odd])


@pytest.mark.parametrize(
    "value",
    [
        {"type": "string", "minLength": "1}/ | /x{1"},
        {"type": "string", "maxLength": True},
        {"type": "string", "minLength": -1},
        {"enum": []},
    ],
)
def test_bounds_that_are_no_numbers_never_get_into_the_grammar_as_they_are(value: dict[str, Any]) -> None:
    """They are a parameter in JSON, whose schema the compiler refuses or reads."""
    rules = dsml_calls([{"name": "f", "parameters": {"properties": {"p": value}}}], False)
    assert 'string="' not in rules and "/x{1" not in rules.split("%json")[0]
    assert "%json" in rules


def test_a_reference_to_a_schema_that_is_true_allows_anything() -> None:
    parameters = {"$defs": {"X": True}, "properties": {"p": {"$ref": "#/$defs/X"}}}
    assert "%json" in dsml_calls([{"name": "f", "parameters": parameters}], False)

"""Tool calls that are demanded: whatever a target would say, the answer is a call that its function takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from draftkit.serve.formats import ForcedCalls
from draftkit.serve.problem import ApiError
from draftkit.serve.structured import constraint_of
from support.fake_engine import fake_served
from support.server import ASSET, SERVE, serving

TEMPLATE = (
    "{% for t in tools %}{{ t | tojson }} {% endfor %}Calls are <tool_call>...</tool_call>.\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor "
    "%}<|im_start|>assistant\n"
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Place(Strict):
    city: Literal["Köln", "Rome", "Oslo"]
    zone: int = Field(ge=0, le=9)


class Weather(Strict):
    """Its schema refers to its own definitions."""

    places: list[Place] = Field(min_length=1, max_length=2)


class Nothing(Strict):
    pass


FUNCTIONS: dict[str, type[BaseModel]] = {"weather": Weather, "now": Nothing}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A server of the embedded target with a chat template that takes tools."""
    folder = tmp_path_factory.mktemp("caller") / "target"
    shutil.copytree(ASSET, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    with serving("--target", str(folder), "--drafter", str(folder / "drafter"), command=SERVE) as running:
        yield openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)


def ask(client: openai.OpenAI, seed: int, **fields: Any) -> Any:
    """An answer of up to 300 tokens, at a temperature at which the target itself would write anything."""
    fields = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 300, "temperature": 1.5} | fields
    messages: Any = [{"role": "user", "content": "Is it raining?"}]
    return client.chat.completions.create(model="", messages=messages, seed=seed, **fields)


def check(calls: Any) -> list[str]:
    """The names of the calls, each of which its function takes."""
    assert calls and len({call.id for call in calls}) == len(calls)
    for call in calls:
        FUNCTIONS[call.function.name].model_validate_json(call.function.arguments)
    return [call.function.name for call in calls]


def test_required_gives_calls_that_are_valid(client: openai.OpenAI) -> None:
    seen: set[str] = set()
    counts: set[int] = set()
    for seed in range(12):
        [choice] = ask(client, seed).choices
        if choice.finish_reason == "length":  # calls without end: nothing says when to stop
            continue
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        names = check(choice.message.tool_calls)
        seen |= set(names)
        counts.add(len(names))
    assert seen == {"weather", "now"} and len(counts) > 1


@pytest.mark.parametrize("name", ["weather", "now"])
def test_the_function_that_is_named_is_called_once(client: openai.OpenAI, name: str) -> None:
    chosen = {"type": "function", "function": {"name": name}}
    for seed in range(4):
        [choice] = ask(client, seed, tool_choice=chosen).choices
        assert choice.finish_reason == "stop" and choice.message.content is None
        assert check(choice.message.tool_calls) == [name]


def test_without_parallel_calls_there_is_one(client: openai.OpenAI) -> None:
    for seed in range(6):
        [choice] = ask(client, seed, parallel_tool_calls=False).choices
        assert choice.finish_reason == "tool_calls" and len(check(choice.message.tool_calls)) == 1


def test_a_stream_has_the_same_calls_and_no_content(client: openai.OpenAI) -> None:
    for seed in range(4):
        [whole] = ask(client, seed).choices
        chunks = [c.choices[0] for c in ask(client, seed, stream=True) if c.choices]
        calls = [call for c in chunks for call in c.delta.tool_calls or []]
        assert [(c.function.name, c.function.arguments) for c in calls] == [
            (c.function.name, c.function.arguments) for c in whole.message.tool_calls or []
        ]
        assert [c.index for c in calls] == list(range(len(calls))) and chunks[
            -1
        ].finish_reason == whole.finish_reason
        if whole.finish_reason != "length":
            assert "".join(c.delta.content or "" for c in chunks) == ""


def test_drafts_change_nothing(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        texts = [
            [(c.function.name, c.function.arguments) for c in told.choices[0].message.tool_calls or []]
            for draft in (True, False)
            for told in [
                ask(client, 0, tool_choice=choice, temperature=0, max_tokens=90, extra_body={"draft": draft})
            ]
        ]
        assert texts[0] == texts[1]


def test_names_may_hold_anything_and_what_cannot_be_enforced_is_a_400() -> None:
    served = fake_served()
    odd = 'add "x"/\\é\n'
    constraint = constraint_of(ForcedCalls(({"name": odd, "parameters": {}},), many=False), served)
    assert constraint is not None
    text = f'<tool_call>\n{{"name": {json.dumps(odd, ensure_ascii=False)}, "arguments": {{}}}}\n</tool_call>'
    assert all(
        constraint.accept(token) for token in served.tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    assert constraint.allowed().nonzero().flatten().tolist() == [served.tokenizer.eos_token_id]
    with pytest.raises(ApiError) as caught:
        constraint_of(
            ForcedCalls(({"name": "f", "parameters": {"type": "object", "not": {}}},), many=False), served
        )
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_a_template_without_calls_cannot_be_forced() -> None:
    with serving(command=SERVE) as running:
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "tool_choice": "required"}
        told = running.http.post("/v1/chat/completions", json=body)
        assert told.status_code == 400 and told.json()["error"]["param"] in ("tools", "tool_choice")

"""POST /v1/responses through the real client: items whole and streamed, conversations that go on, forms, and
what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from draftkit.serve.responses_body import ResponsesBody, messages_of
from support.fake_engine import TEXT
from support.in_thread import answering
from support.patience import PATIENCE

QWEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SAID = f"<think>\nadd\n</think>\n\nI look.\n{QWEN}"
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "What it is like outside.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
ASKED: Any = {"model": "", "input": "What?", "instructions": "Be brief.", "temperature": 0, "tools": [TOOL]}
ORDER = [
    "response.created",
    "response.in_progress",
    *("response.output_item.added", "response.content_part.added", "response.reasoning_text.delta"),
    *("response.reasoning_text.done", "response.content_part.done", "response.output_item.done"),
    *("response.output_item.added", "response.content_part.added", "response.output_text.delta"),
    *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
    *("response.output_item.added", "response.function_call_arguments.delta"),
    *("response.function_call_arguments.done", "response.output_item.done"),
    "response.completed",
]


@contextmanager
def client(family: str, text: str = TEXT) -> Iterator[openai.OpenAI]:
    with answering(family, text) as url:
        http = httpx.Client(trust_env=False, timeout=PATIENCE)
        yield openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0, http_client=http)


@pytest.fixture(scope="module")
def api() -> Iterator[openai.OpenAI]:
    with client("qwen3", SAID) as made:
        yield made


def shapes(output: Any) -> list[Any]:
    """What items say, without their ids."""
    found: list[Any] = []
    for item in output:
        if item.type == "function_call":
            found.append(("call", item.name, json.loads(item.arguments)))
        else:
            found.append((item.type, [part.text for part in item.content]))
    return found


EXPECTED = [("reasoning", ["add"]), ("message", ["I look."]), ("call", "weather", {"city": "Köln"})]


def test_items_of_a_whole_answer(api: openai.OpenAI) -> None:
    answer: Any = api.responses.create(**ASKED)
    assert shapes(answer.output) == EXPECTED
    assert (answer.status, answer.output_text, answer.store) == ("completed", "I look.", False)
    chat = api.chat.completions.create(
        model="",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
        temperature=0,
        tools=[{"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}],
    )
    assert chat.usage is not None, "the same chat was asked for"
    used = (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens)
    assert used == (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens)
    assert answer.usage.output_tokens_details.reasoning_tokens > 0


def test_events_come_in_the_official_order_and_add_up(api: openai.OpenAI) -> None:
    events: list[Any] = list(api.responses.create(**ASKED, stream=True))
    kinds = [e.type for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]] == ORDER
    assert [e.sequence_number for e in events] == list(range(len(events)))
    last = events[-1].response
    assert shapes(last.output) == EXPECTED and last.usage.output_tokens > 0
    ids = [item.id for item in last.output]
    assert len(set(ids)) == 3
    for event in events:
        if hasattr(event, "item_id"):
            assert event.item_id == ids[event.output_index]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == last.output_text


def test_the_clients_own_stream_reader_takes_it(api: openai.OpenAI) -> None:
    with api.responses.stream(**ASKED) as stream:
        final: Any = stream.get_final_response()
    assert shapes(final.output) == EXPECTED


def test_an_agent_that_sends_everything_back(api: openai.OpenAI) -> None:
    first: Any = api.responses.create(**ASKED)
    call = next(item for item in first.output if item.type == "function_call")
    history = [{"role": "user", "content": "What?"}, *(item.model_dump() for item in first.output)]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    again: Any = api.responses.create(**{**ASKED, "input": history})
    assert again.status == "completed" and again.usage.input_tokens > first.usage.input_tokens
    messages = messages_of("Be brief.", history)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool"]
    said = messages[2]
    assert (said["reasoning_content"], said["content"]) == ("add", "I look.")
    [made] = said["tool_calls"]
    assert made["id"] == call.call_id == messages[3]["tool_call_id"]
    assert json.loads(made["function"]["arguments"]) == {"city": "Köln"}


def test_two_answers_are_two_messages_and_developers_join_the_instructions() -> None:
    given: list[Any] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Use tools."}]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
    ]
    assert messages_of("Be brief.", given) == [
        {"role": "system", "content": "Be brief.\n\nUse tools."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "reasoning_content": "hm", "content": "two"},
    ]


def test_an_answer_that_was_cut_says_so() -> None:
    with client("chatml") as api:
        asked: Any = {"model": "", "input": "hi", "temperature": 0, "max_output_tokens": 5}
        answer: Any = api.responses.create(**asked)
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert answer.usage.output_tokens == 5 and TEXT.startswith(answer.output_text)
        events: list[Any] = list(api.responses.create(**asked, stream=True))
        assert events[-1].type == "response.incomplete" and events[-2].item.status == "incomplete"


class City(BaseModel):
    name: str


def test_a_schema_is_asked_for_and_kept() -> None:
    form = {"type": "json_schema", "name": "City", "schema": City.model_json_schema(), "strict": True}
    body = ResponsesBody.model_validate({"input": "hi", "text": {"format": form}})
    asked = body.chat().response_format
    assert asked is not None and asked.json_schema is not None
    assert asked.json_schema.schema_ == City.model_json_schema() and asked.binds


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "cuts no input"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"input": []}, "input", "a text or a list of items"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input_image"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "arguments"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens is too large"),
        ({"temperature": -1}, "temperature", "greater than or equal"),
    ],
)
def test_what_is_refused_names_its_field(
    api: openai.OpenAI, fields: dict[str, Any], param: str, told: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        api.responses.create(**{"model": "", "input": "hi", **fields})
    assert caught.value.param == param


def test_a_stream_that_cannot_go_on_ends_with_a_failure() -> None:
    breaks, events = Event(), list[Any]()
    with answering("chatml", breaks=breaks) as url:
        api = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        for event in api.responses.create(model="", input="hi", temperature=0, stream=True):
            events.append(event)
            if event.type == "response.output_text.delta":
                breaks.set()
    last = events[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.message and "response.output_text.delta" in {e.type for e in events}

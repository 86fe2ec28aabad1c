"""POST /v1/messages through Anthropic's own client: blocks whole and streamed, conversations that go on,
keys, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import anthropic
import httpx
import pytest

from draftkit.serve.anthropic_body import MessagesBody
from draftkit.serve.settings import ServeSettings
from support.fake_engine import TEXT
from support.in_thread import answering
from support.patience import PATIENCE

QWEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SAID = f"<think>\nadd\n</think>\n\nI look.\n{QWEN}"
TOOL: Any = {
    "name": "weather",
    "description": "What it is like outside.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASKED: Any = {
    "model": "",
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": "What?"}],
    "max_tokens": 200,
    "tools": [TOOL],
}
EXPECTED = [("thinking", "add"), ("text", "I look."), ("tool_use", "weather", {"city": "Köln"})]


@contextmanager
def client(family: str, text: str = TEXT, **more: Any) -> Iterator[anthropic.Anthropic]:
    with answering(family, text, **more) as url:
        yield anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0)


@pytest.fixture(scope="module")
def api() -> Iterator[anthropic.Anthropic]:
    with client("qwen3", SAID) as made:
        yield made


def shapes(content: Any) -> list[Any]:
    return [
        (b.type, b.name, b.input) if b.type == "tool_use" else (b.type, getattr(b, b.type)) for b in content
    ]


def test_blocks_of_a_whole_answer(api: anthropic.Anthropic) -> None:
    answer = api.messages.create(**ASKED)
    assert shapes(answer.content) == EXPECTED
    assert (answer.role, answer.stop_reason, answer.stop_sequence) == ("assistant", "tool_use", None)
    counted = api.messages.count_tokens(**{k: v for k, v in ASKED.items() if k != "max_tokens"})
    told = answer.usage
    assert told.input_tokens + (told.cache_read_input_tokens or 0) == counted.input_tokens > 0


def test_events_in_order_and_what_they_add_up_to(api: anthropic.Anthropic) -> None:
    events: list[Any] = list(api.messages.create(**ASKED, stream=True))
    kinds = [e.type for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]] == [
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_stop") * 3,
        "message_delta",
        "message_stop",
    ]
    starts = [e.index for e in events if e.type == "content_block_start"]
    assert starts == [0, 1, 2]
    assert events[0].message.usage.input_tokens > 0 and events[-2].usage.output_tokens > 0
    with api.messages.stream(**ASKED) as stream:
        final = stream.get_final_message()
    assert shapes(final.content) == EXPECTED and final.stop_reason == "tool_use"
    assert final.usage.output_tokens == events[-2].usage.output_tokens


def test_an_agent_that_sends_everything_back(api: anthropic.Anthropic) -> None:
    first = api.messages.create(**ASKED)
    use = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "rain"}]}
    turns: list[Any] = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "Go on."}]},
    ]
    again = api.messages.create(**{**ASKED, "messages": turns})
    assert again.usage.input_tokens > first.usage.input_tokens
    chat = MessagesBody.model_validate({**ASKED, "messages": turns}).chat()
    shown = [m.as_dict() for m in chat.messages]
    assert [m["role"] for m in shown] == ["system", "user", "assistant", "tool", "user"]
    assert (shown[2]["reasoning_content"], shown[2]["content"]) == ("add", "I look.")
    assert shown[2]["tool_calls"][0]["id"] == use.id == shown[3]["tool_call_id"]
    assert (shown[3]["content"], shown[4]["content"]) == ("rain", "Go on.")


def test_why_an_answer_ended() -> None:
    with client("chatml") as api:
        plain: Any = {k: v for k, v in ASKED.items() if k != "tools"}
        assert api.messages.create(**plain).stop_reason == "end_turn"
        cut = api.messages.create(**{**plain, "max_tokens": 5})
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
        stopped = api.messages.create(**plain, stop_sequences=["fox"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "fox")
        assert stopped.content[0].type == "text" and stopped.content[0].text == TEXT[: TEXT.index("fox")]


def test_thinking_tool_choices_and_sampling_reach_the_chat() -> None:
    def chat(**more: Any) -> Any:
        return MessagesBody.model_validate({**ASKED, **more}).chat()

    assert chat(thinking={"type": "disabled"}).chat_template_kwargs == {"enable_thinking": False}
    thinks = chat(thinking={"type": "enabled", "budget_tokens": 1024})
    assert thinks.chat_template_kwargs == {"enable_thinking": True} and chat().chat_template_kwargs == {}
    assert chat(tool_choice={"type": "any"}).tool_choice == "required"
    named = chat(tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True})
    assert named.tool_choice.function.name == "weather" and not named.parallel_tool_calls
    begun = chat(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "{"}])
    assert begun.continue_final_message
    drawn = chat(temperature=0.5, top_p=0.9, top_k=20, stop_sequences=["x"])
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.stop) == (0.5, 0.9, 20, ["x"])


def test_keys_and_errors_are_those_that_its_clients_know() -> None:
    with client("chatml", settings=ServeSettings(api_keys=("secret",))) as api:
        asked: Any = {"model": "", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        assert api.messages.create(**asked).type == "message"
        bearer = anthropic.Anthropic(base_url=api.base_url, auth_token="secret", max_retries=0)
        assert bearer.messages.create(**asked).type == "message"
        with pytest.raises(anthropic.AuthenticationError) as caught:
            anthropic.Anthropic(base_url=api.base_url, api_key="no", max_retries=0).messages.create(**asked)
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index, call-overload]
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            api.messages.create(**{**asked, "model": "other"})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"max_tokens": 10**6}, "too large"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image' cannot be read"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content: must have a block"),
        ({"messages": [{"role": "user", "content": 3}]}, "a text or a list of blocks"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "needs tools"),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences"),
        (
            {
                "tools": None,
                "output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}},
            },
            "output_config.format: this schema cannot be compiled",
        ),
    ],
)
def test_what_is_refused_is_told_in_anthropics_form(
    api: anthropic.Anthropic, fields: dict[str, Any], told: str
) -> None:
    url = f"{str(api.base_url).rstrip('/')}/v1/messages"
    answer = httpx.post(url, json={**ASKED, **fields}, trust_env=False, timeout=PATIENCE)
    assert answer.status_code == 400
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert told in body["error"]["message"]


def test_a_stream_that_cannot_go_on_ends_with_an_error() -> None:
    breaks, asked = Event(), {k: v for k, v in ASKED.items() if k != "tools"}

    def read(api: anthropic.Anthropic) -> None:
        for event in api.messages.create(**asked, stream=True):
            if event.type == "content_block_delta":
                breaks.set()

    with client("chatml", breaks=breaks) as api, pytest.raises(anthropic.APIError, match="engine"):
        read(api)

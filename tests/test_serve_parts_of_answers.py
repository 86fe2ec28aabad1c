"""What a server makes of an answer's reasoning and calls, in each family's form, whole and streamed,
through the real client; and variables of the chat template that hold for all requests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from checks.chats import TOOL
from support.in_thread import answering
from support.patience import PATIENCE
from support.templates import FAMILIES

MESSAGES: Any = [{"role": "user", "content": "What?"}]
CALL = ("weather", {"city": "Köln"})
THE_CALL: Any = (None, None, [CALL])
QWEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
# family, what the target writes, (reasoning, content, calls)
ANSWERS: dict[str, tuple[str, str, tuple[str | None, str | None, list[Any]]]] = {
    "qwen3": ("qwen3", f"<think>\nadd\n</think>\n\n{QWEN}", ("add", None, [CALL])),
    "qwen3 words": ("qwen3", "<think>\nadd\n</think>\n\nFour.", ("add", "Four.", [])),
    "opened": ("qwen3 thinking only", "add\n</think>\n\nFour.", ("add", "Four.", [])),
    "gpt-oss": (
        "gpt-oss",
        "<|channel|>analysis<|message|>add<|end|><|start|>assistant<|channel|>final<|message|>Four.",
        ("add", "Four.", []),
    ),
    "gpt-oss calls": (
        "gpt-oss",
        "<|channel|>analysis<|message|>add<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.weather <|message|>{"city": "Köln"}<|call|>',
        ("add", None, [CALL]),
    ),
    "gemma4": (
        "gemma4",
        '<|channel>thought\nadd\n<channel|><|tool_call>call:weather{city:<|"|>Köln<|"|>}<tool_call|>',
        ("add", None, [CALL]),
    ),
    "mistral": (
        "mistral",
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Köln"}}]',
        (None, None, [CALL]),
    ),
    "chatml": ("chatml", "<think>x</think>Four.", (None, "<think>x</think>Four.", [])),
}


@contextmanager
def client(family: str, text: str, **switches: Any) -> Iterator[openai.OpenAI]:
    with answering(family, text, **switches) as url:
        yield openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)


def calls_of(calls: Any) -> list[Any]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in calls or []]


@pytest.mark.parametrize("name", ANSWERS)
def test_reasoning_and_calls_whole_and_streamed(name: str) -> None:
    family, text, (reasoning, content, calls) = ANSWERS[name]
    asked: dict[str, Any] = {"model": "", "messages": MESSAGES, "temperature": 0, "max_tokens": 200}
    asked |= {"tools": [TOOL]} if calls else {}
    with client(family, text) as api:
        [choice] = api.chat.completions.create(**asked).choices
        said: Any = choice.message
        assert (getattr(said, "reasoning_content", None), said.content or None) == (reasoning, content)
        assert calls_of(said.tool_calls) == calls
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        chunks = [c.choices[0] for c in api.chat.completions.create(**asked, stream=True)]
        deltas: list[Any] = [c.delta for c in chunks]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == (reasoning or "")
        assert "".join(d.content or "" for d in deltas) == (content or "")
        assert calls_of([call for d in deltas for call in d.tool_calls or []]) == calls
        assert chunks[-1].finish_reason == choice.finish_reason
        [silent] = api.chat.completions.create(**asked, extra_body={"include_reasoning": False}).choices
        assert getattr(silent.message, "reasoning_content", None) is None
        assert (silent.message.content or None) == content
        if reasoning and content:
            first = next(i for i, d in enumerate(deltas) if d.content)
            assert any(getattr(d, "reasoning_content", None) for d in deltas[:first]), "it came first"


XML = "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>"
KEYS = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n</tool_call>"


@pytest.mark.parametrize(("form", "said"), [("<function=f>", XML), ("<arg_key>", KEYS)])
def test_calls_in_other_forms_than_json_are_read_and_not_demanded(form: str, said: str) -> None:
    """Qwen3-Coder's XML and GLM's pairs: calls, and a 400 where one is demanded, which would force JSON."""
    template = FAMILIES["qwen3"].template.replace('{"name": ..., "arguments": ...}', form)
    assert form in template
    asked: dict[str, Any] = {"model": "", "messages": MESSAGES, "max_tokens": 200, "tools": [TOOL]}
    with answering("qwen3", said, template=template) as url:
        api = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        [choice] = api.chat.completions.create(**asked).choices
        assert calls_of(choice.message.tool_calls) == [CALL] and choice.finish_reason == "tool_calls"
        with pytest.raises(openai.BadRequestError, match="no form for calls that can be demanded"):
            api.chat.completions.create(**asked, tool_choice="required")


def test_a_target_without_a_template_completes_texts_and_refuses_chats() -> None:
    with answering("chatml", "Four.", template="") as url:
        api = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)
        assert api.completions.create(model="", prompt="2 + 2 = ", max_tokens=50).choices[0].text == "Four."
        with pytest.raises(openai.BadRequestError, match=r"no chat template.*use /v1/completions"):
            api.chat.completions.create(model="", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            api.responses.create(model="", input="What?")


def test_what_is_forced_or_asked_for_with_its_marks_is_left_whole() -> None:
    asked: dict[str, Any] = {"model": "", "messages": MESSAGES, "temperature": 0, "max_tokens": 200}
    with client("gpt-oss", ANSWERS["gpt-oss"][1]) as api:
        [choice] = api.chat.completions.create(**asked, extra_body={"skip_special_tokens": False}).choices
        assert choice.message.content == ANSWERS["gpt-oss"][1]
        with pytest.raises(openai.BadRequestError, match="no form for calls that can be demanded"):
            api.chat.completions.create(**asked, tools=[TOOL], tool_choice="required")


def test_template_variables_for_all_requests() -> None:
    with client("qwen3", "Four.", enable_thinking=False) as api:
        base = str(api.base_url).removesuffix("v1/")
        http = httpx.Client(base_url=base, trust_env=False, timeout=PATIENCE)

        def ending(**more: Any) -> str:
            ids = http.post("tokenize", json={"messages": MESSAGES, **more}).json()["tokens"]
            return str(http.post("detokenize", json={"tokens": ids}).json()["prompt"])[-30:]

        assert ending().endswith("<think>\n\n</think>\n\n")
        assert ending(chat_template_kwargs={"enable_thinking": True}).endswith("assistant\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switch", "told"),
    [
        ("enable_thinkin=false", "never mentions it"),
        ("enable_thinking", "give NAME=VALUE"),
        ("a=[", "give NAME="),
    ],
)
def test_variables_that_nobody_knows_end_the_command(switch: str, told: str) -> None:
    command = [sys.executable, "-m", "draftkit.cli", "serve", "--port", "0", "--template-switch", switch]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr

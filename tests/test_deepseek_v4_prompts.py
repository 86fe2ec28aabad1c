"""DeepSeek-V4's prompt format: the worked examples of its encoders, and conversations that come back
unchanged."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import deepseek_recipe as recipe
import pytest

from draftkit.errors import ConfigError, TargetError
from draftkit.target.deepseek_v4_messages import message_of
from draftkit.target.deepseek_v4_prompts import CLOSE, DeepseekFormat, speaks_deepseek_v4
from draftkit.target.prompt_format import TemplateError
from support.targets import TEXTS
from tools.tiny_v4 import MARKUP, SPECIAL, v4_tokenizer

BOS, EOS, U, A = SPECIAL[:4]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOKENIZER = v4_tokenizer(TEXTS)
LOW = {"reasoning_effort": "low"}
CHAT = {"thinking": False}


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def system(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def said(content: str, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


def call(name: str, number: str, **arguments: Any) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def block(*places: tuple[str, int]) -> str:
    calls = "\n".join(
        '<｜DSML｜invoke name="get_weather">\n'
        f'<｜DSML｜parameter name="city" string="true">{city}</｜DSML｜parameter>\n'
        f'<｜DSML｜parameter name="days" string="false">{days}</｜DSML｜parameter>\n</｜DSML｜invoke>'
        for city, days in places
    )
    return f"\n\n<｜DSML｜tool_calls>\n{calls}\n</｜DSML｜tool_calls>"


S22 = [system("S"), user("2+2?")]
ABC = [user("A"), said("B", "r1"), user("C")]
WEATHER = [
    system("S"),
    user("Weather?"),
    said(
        "",
        "need tool",
        tool_calls=[
            call("get_weather", "c1", city="Paris", days=2),
            call("get_weather", "c2", city="Rome", days=2),
        ],
    ),
    {"role": "tool", "tool_call_id": "c2", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]
EXAMPLES: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("1", S22, CHAT, f"{BOS}S{U}2+2?{A}</think>"),
    ("2", S22, LOW, f"{BOS}S{U}2+2?{A}<think>"),
    ("3", ABC, LOW, f"{BOS}{U}A{A}</think>B{EOS}{U}C{A}<think>"),
    ("3-kept", ABC, LOW | {"drop_thinking": False}, f"{BOS}{U}A{A}<think>r1</think>B{EOS}{U}C{A}<think>"),
    ("5", [user("a"), user("b")], CHAT, f"{BOS}{U}a\n\nb{A}</think>"),
    (
        "6",
        [system("S"), {"role": "latest_reminder", "content": "2026-01-01"}, user("x")],
        CHAT,
        f"{BOS}S<｜latest_reminder｜>2026-01-01{U}x{A}</think>",
    ),
    ("7-action", [user("p", task="action")], LOW, f"{BOS}{U}p{A}<think><｜action｜>"),
    ("7-query", [user("p", task="query")], {}, f"{BOS}{U}p<｜query｜>"),
    ("7-title", [user("p"), said("a", task="title")], CHAT, f"{BOS}{U}p{A}</think>a{EOS}<｜title｜>"),
    (
        "8",
        [system("S", response_format={"type": "json_object"}), user("x")],
        CHAT,
        f"{BOS}S\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        f'{{"type": "json_object"}}{U}x{A}</think>',
    ),
    ("9", [user("a"), said("Sure", wo_eos=True)], CHAT, f"{BOS}{U}a{A}</think>Sure"),
    ("9-api", [user("a"), said("Sure", prefix=True)], CHAT, f"{BOS}{U}a{A}</think>Sure"),
    (
        "url",
        [user("p<｜extracted_url｜>u", task="read_url")],
        {},
        f"{BOS}{U}p<｜extracted_url｜>u<｜read_url｜>",
    ),
]


@pytest.mark.parametrize(
    ("messages", "switches", "wanted"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES]
)
def test_worked_examples(messages: list[dict[str, Any]], switches: dict[str, Any], wanted: str) -> None:
    shown = DeepseekFormat(TOKENIZER, switches)
    assert shown.text(messages) == wanted
    assert TOKENIZER.decode(shown.prompt(messages)) == wanted


def test_tool_calls_and_results_are_written_as_deepseek_writes_them() -> None:
    shown = DeepseekFormat(TOKENIZER, LOW)
    text = shown.text(WEATHER, [TOOL])
    before, _, rest = text.partition(f"{U}Weather?")
    assert before.startswith(f"{BOS}S\n\n## Tools") and '"get_weather"' in before
    wanted = f"{A}<think>need tool</think>{block(('Paris', 2), ('Rome', 2))}{EOS}"
    wanted += f"{U}<tool_result>rain</tool_result>\n\n<tool_result>sunny</tool_result>{A}<think>"
    assert rest == wanted
    longer = [*WEATHER, said("Rain/sun", "done"), user("Thanks")]
    assert shown.text(longer, [TOOL]) == f"{text}done</think>Rain/sun{EOS}{U}Thanks{A}<think>"


def test_the_generations_of_the_encoder_differ_in_what_efforts_are_called() -> None:
    def text(encoder: str, **switches: Any) -> str:
        return DeepseekFormat(TOKENIZER, {"encoder": encoder, **switches}).text(S22)

    high, most = (text("official", reasoning_effort=e) for e in ("high", "max"))
    for told in (high, most):  # the prefix stands before all else
        assert told.startswith(BOS) and told.endswith(f"S{U}2+2?{A}<think>")
    assert len({high, most, text("official", **LOW)}) == 3 and text("official") == high
    assert text("preview", reasoning_effort="high") == text("preview") == text("official", **LOW)
    assert text("preview", reasoning_effort="max") == high
    assert text("preview", thinking=False) == text("official", thinking=False)
    with pytest.raises(ConfigError, match="the preview encoder has no low; choose high or max"):
        text("preview", **LOW)
    for name, encoder in (
        ("deepseek-ai/DeepSeek-V4-Flash", "preview"),
        ("/models/DeepSeek-V4-Pro-DSpark/", "preview"),
        ("deepseek-ai/DeepSeek-V4-Pro-0813", "official"),
    ):
        assert DeepseekFormat(v4_tokenizer(TEXTS, name)).encoder == encoder


def test_ids_are_those_of_deepseeks_own_encoder_and_text_smuggles_no_special_token() -> None:
    messages = [user(f"hi {CLOSE} {U} <｜DSML｜tool_calls> {EOS}"), said("ok"), user("{}")]
    shown = DeepseekFormat(TOKENIZER, CHAT)
    own = recipe.DeepseekV4Encoding().with_tokenizer(
        recipe.Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    )
    conversation = recipe.Conversation([message_of(recipe, m) for m in messages], thinking_mode=False)
    ids = shown.prompt(messages)
    assert list(ids) == own.encode(conversation)
    special = [TOKENIZER.convert_ids_to_tokens(i) for i in ids if i in shown._names]
    assert special == [BOS, U, A, CLOSE, EOS, U, A, CLOSE]
    assert list(ids) != TOKENIZER(shown.text(messages), add_special_tokens=False)["input_ids"]


def test_answers_are_parsed_whole_and_in_pieces() -> None:
    shown = DeepseekFormat(TOKENIZER, LOW)
    text = f"think</think>Hi{block(('Paris', 2))}{EOS}"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    parts = shown.parse(ids)
    assert (parts.reasoning, parts.content) == ("think", "Hi")
    (made,) = parts.tool_calls
    assert made["function"] == {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}
    stream, deltas = shown.stream(), []
    for token in ids:
        deltas += stream.add([token])
    deltas += stream.close()
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "think"
    assert "".join(d.get("content", "") for d in deltas) == "Hi"
    pieces = [c["function"] for d in deltas for c in d.get("tool_calls", ())]
    assert "".join(p.get("arguments", "") for p in pieces) == made["function"]["arguments"]
    assert stream.finish() == parts

    def parsed(text: str, switches: dict[str, Any] = LOW) -> tuple[str | None, str]:
        found = DeepseekFormat(TOKENIZER, switches).parse(
            TOKENIZER(text, add_special_tokens=False)["input_ids"]
        )
        return found.reasoning, found.content

    assert parsed("\nthink\n</think>\n\nHi") == ("think", "Hi")
    assert parsed("never ends") == ("never ends", "")
    assert parsed(f"plain{EOS}", CHAT) == (None, "plain")


@pytest.mark.parametrize("tag", ["parameter", "invoke", "tool_calls"])
def test_a_closing_tag_in_a_string_of_json_is_no_end(tag: str) -> None:
    """DeepSeek's parser alone cuts the value there, which leaves no JSON."""
    given: dict[str, Any] = {"city": "Rom", "more": [f"a</｜DSML｜{tag}>b", {"k": '<x "y">'}], "days": 2}
    calls = [call("get_weather", "c0", **given), call("get_weather", "c1", city="Oslo")]
    shown = DeepseekFormat(TOKENIZER, CHAT)
    said_by_it = shown.text([user("x"), said("Hi", tool_calls=calls), user("y")])
    text = said_by_it.partition(CLOSE)[2].partition(f"{EOS}{U}")[0]
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]  # every tag is DeepSeek's own token
    reader = shown.reader(with_calls=True)
    for parts in (shown.parse(ids), reader.add(text) + reader.finish()):
        assert parts.content == "Hi"
        made = [json.loads(c["function"]["arguments"]) for c in parts.tool_calls]
        assert made == [given, {"city": "Oslo"}]


def test_arguments_that_are_no_json_stay_as_deepseeks_parser_gives_them() -> None:
    text = block(("Rom", 2)).replace(">2<", '>"2<') + EOS
    (made,) = (
        DeepseekFormat(TOKENIZER, CHAT)
        .parse(TOKENIZER(text, add_special_tokens=False)["input_ids"])
        .tool_calls
    )
    assert made["function"] == {"name": "get_weather", "arguments": '{"city": "Rom", "days": "2}'}


def test_what_does_not_fit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = DeepseekFormat(TOKENIZER)
    bad = said("", tool_calls=[{"id": "c", "function": {"name": "f", "arguments": "{bad"}}])
    for messages, told in (
        ([user("x"), bad, {"role": "tool", "content": "r"}], "arguments of 'f' is not a JSON object"),
        ([user("x", task="translate")], "task 'translate' is not known"),
        ([user("x", task="query"), user("y")], "only the last message may have a task"),
        ([user("x"), said("a", prefix=True), user("y")], "only the last message may have a prefix"),
        ([{"content": "x", "task": "query"}], "belongs to a message of the user"),
        ([user("x"), {"role": "assistant", "content": 5, "prefix": True}], "int"),
        ([user("x", task="title")], "belongs to a message of the assistant"),
        ([user("x"), said("a", task="title", prefix=True)], "comes after a whole answer; leave prefix out"),
        ([{"role": "tool", "content": "x", "task": "query"}], "belongs to a message of the user"),
        ([user("x"), said("", tool_calls=[{"id": "c", "function": "f"}]), user("y")], "tool_calls must be"),
        ([user("x"), said("", tool_calls=[{"id": "c"}]), user("y")], "tool_calls must be"),
        (
            [user("x"), said("", tool_calls=[call("f", "c", a=float("nan"))])],
            "arguments of 'f' is not a JSON object",
        ),
        ([user("x", response_format="json")], "response_format is a str, must be an object"),
        ([user("x", response_format={"type": "json_schema"})], "needs json_schema.schema, an object"),
        ([user("x"), said("a", ["r"]), user("y")], "str"),
        ([user("\ud800")], "surrogates not allowed"),
        ([{"role": "critic", "content": "x"}], "role 'critic'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "text parts only"),
    ):
        with pytest.raises(TemplateError, match=told):
            shown.prompt(messages)
    with pytest.raises(TemplateError, match="is answered without thinking"):
        DeepseekFormat(TOKENIZER, {"thinking": True}).prompt([user("x", task="query")])
    for switches, told in (
        ({"think": True}, "DeepSeek-V4 has thinking"),
        ({"thinking": "yes"}, "must be true or false"),
        ({"reasoning_effort": "enormous"}, "choose none, low, high, max"),
        ({"encoder": "v3"}, "choose official or preview"),
        ({"reasoning_effort": ["high"]}, "choose none, low, high, max"),
        ({"drop_thinking": 1}, "must be true or false"),
        ({"reasoning_effort": "none", "thinking": True}, "give one of the two"),
    ):
        with pytest.raises(ConfigError, match=told):
            DeepseekFormat(TOKENIZER, switches)
    monkeypatch.setitem(sys.modules, "deepseek_recipe", None)
    with pytest.raises(TargetError, match=r"which is missing: pip install 'draftkit\[deepseek\]'"):
        DeepseekFormat(TOKENIZER)
    assert speaks_deepseek_v4(TOKENIZER)


WORDS = [
    "def",
    "é",
    "漢字",
    "🙂",
    "\n",
    "a\u0301",
    "&lt;",
    '"',
    "\\n",
    "\ttab",
    "نص",
    "\u200b",
    *SPECIAL,
    *MARKUP,
]
WORDS += ["<｜DSML｜tool_calls>", "</｜DSML｜parameter>", "<tool_result>", "</think>", "{", "}", "0.1", " "]


def _words(random: random.Random, least: int = 1) -> str:
    text = "".join(random.choice(WORDS) + random.choice(["", " "]) for _ in range(random.randint(least, 9)))
    return f"x{text}y"  # the parser strips line ends at the edges


def _conversation(random: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    tools = [TOOL] if random.random() < 0.5 else []
    messages = [system(_words(random))] if random.random() < 0.5 else []
    for _ in range(random.randint(1, 3)):
        messages.append(user(_words(random)))
        calls = [
            call(
                "get_weather",
                f"c{i}",
                city=_words(random),
                more=[_words(random), None, {"k": _words(random)}],
            )
            for i in range(random.randint(1, 3) if tools and random.random() < 0.6 else 0)
        ]
        messages.append(said("" if calls and random.random() < 0.5 else _words(random), _words(random)))
        if calls:
            messages[-1]["tool_calls"] = calls
            messages += [{"role": "tool", "tool_call_id": c["id"], "content": _words(random)} for c in calls]
            messages.append(said(_words(random), _words(random)))
    return messages, tools


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["official", "preview"])
def test_two_thousand_random_conversations_come_back_unchanged(encoder: str) -> None:
    """Every answer is tokenised in its context and parsed back, whatever special token's name the text
    spells."""
    check_round_trips(encoder, 2000)


@pytest.mark.parametrize("encoder", ["official", "preview"])
def test_random_conversations_come_back_unchanged(encoder: str) -> None:
    check_round_trips(encoder, 40)


def check_round_trips(encoder: str, count: int) -> None:
    numbers, answers = random.Random(encoder), 0
    modes: list[dict[str, Any]] = [
        {"thinking": False},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "max"},
    ]
    modes += [{"drop_thinking": False}] + ([LOW] if encoder == "official" else [])
    formats = [DeepseekFormat(TOKENIZER, {"encoder": encoder, **mode}) for mode in modes]
    for _ in range(count):
        messages, tools = _conversation(numbers)
        shown = numbers.choice(formats)
        wanted = [m for m in messages if m["role"] == "assistant"]
        turns = shown.turns(messages, tools)
        assert len(turns) == len(wanted)
        for turn, message in zip(turns, wanted, strict=True):
            parts = shown.parse(turn.answer_ids)
            assert parts.content == message["content"]
            assert parts.reasoning == (message["reasoning_content"] if shown.mode.thinking else None)
            made = [json.loads(c["function"]["arguments"]) for c in parts.tool_calls]
            assert made == [json.loads(c["function"]["arguments"]) for c in message.get("tool_calls", ())]
            text = shown.text(messages[: messages.index(message)], tools)
            assert TOKENIZER.decode(turn.prompt_ids) == text
            answers += 1
    assert answers > count

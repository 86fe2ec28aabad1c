"""An answer taken apart as it comes: the same, whatever the pieces, as when it is there at once."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from draftkit.target.answer_parts import AnswerStyle
from draftkit.target.answer_stream import AnswerDelta, AnswerStream, parse_answer

HERMES = AnswerStyle("think", thinks=True, calls=True)
LLAMA = AnswerStyle("think", calls=True, bare_calls=True)
HARMONY, GEMMA, MISTRAL = (AnswerStyle(name, True, True) for name in ("harmony", "gemma", "mistral"))
SPECIAL = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
    "<turn|>",
    "</s>",
    "[ARGS]",
)
Call = tuple[str, dict[str, Any]]

# style, text, (reasoning, content, calls)
CASES: dict[str, tuple[AnswerStyle, str, tuple[str, str, list[Call]]]] = {
    "plain": (HERMES, "  a list \n", ("", "  a list \n", [])),
    "thought": (HERMES, "<think>\nadd\nup\n</think>\n\nFour.", ("add\nup", "Four.", [])),
    "thought that is empty": (HERMES, "<think>\n\n</think>\n\nFour. ", ("", "Four. ", [])),
    "thought that is cut": (HERMES, "<think>\nadd", ("add", "", [])),
    "a tag in the content": (HERMES, "Write <think>x</think> so.", ("", "Write <think>x</think> so.", [])),
    "thought and calls": (
        HERMES,
        '<think>hm</think>\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
        '{"name": "g", "arguments": {}}\n</tool_call>',
        ("hm", "", [("f", {"a": 1}), ("g", {})]),
    ),
    "a call without its end": (HERMES, 'Yes. <tool_call>{"name": "f"}', ("", "Yes.", [("f", {})])),
    "no call": (HERMES, "<tool_call>nothing</tool_call>", ("", "<tool_call>nothing</tool_call>", [])),
    "xml call": (
        HERMES,
        "<tool_call>\n<function=f>\n<parameter=a>1</parameter>\n<parameter=b>\nx y\n</parameter>\n"
        "</function>\n</tool_call>",
        ("", "", [("f", {"a": 1, "b": "x y"})]),
    ),
    "pairs": (
        HERMES,
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
        ("", "", [("f", {"a": "x"})]),
    ),
    "bare call": (LLAMA, '{"name": "f", "parameters": {"a": 1}}', ("", "", [("f", {"a": 1})])),
    "bare JSON": (LLAMA, '{"a": 1}', ("", '{"a": 1}', [])),
    "harmony": (
        HARMONY,
        "<|channel|>analysis<|message|>add<|end|><|start|>assistant<|channel|>final<|message|>Four."
        "<|return|>",
        ("add", "Four.", []),
    ),
    "harmony calls": (
        HARMONY,
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        ("a\nb", "", [("f", {"a": 1})]),
    ),
    "harmony call, recipient last": (
        HARMONY,
        '<|channel|>commentary to=functions.a.f <|constrain|>json<|message|>{"a": 1}',
        ("", "", [("a.f", {"a": 1})]),
    ),
    "harmony without channels": (HARMONY, "Four.<|return|>", ("", "Four.", [])),
    "gemma": (GEMMA, "<|channel>thought\nadd\n<channel|>Four.<turn|>", ("add", "Four.", [])),
    "gemma, no thought": (GEMMA, "<|channel>thought\n<channel|>Four.<turn|>", ("", "Four.", [])),
    "gemma calls": (
        GEMMA,
        'So:<|tool_call>call:f{a:<|"|>x, {y}<|"|>,b:-1.5,c:true,d:[1,<|"|>z<|"|>],e:{k:null},g:{}}'
        "<tool_call|><|tool_call>call:g{}<tool_call|><|tool_response>",
        (
            "",
            "So:<|tool_response>",
            [
                ("f", {"a": "x, {y}", "b": -1.5, "c": True, "d": [1, "z"], "e": {"k": None}, "g": {}}),
                ("g", {}),
            ],
        ),
    ),
    "gemma, broken call": (
        GEMMA,
        "<|tool_call>call:f{a<tool_call|>",
        ("", "<|tool_call>call:f{a<tool_call|>", []),
    ),
    "mistral list": (
        MISTRAL,
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]</s>',
        ("", "", [("f", {"a": 1})]),
    ),
    "mistral": (
        MISTRAL,
        '[THINK]add[/THINK]Four.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}</s>',
        ("add", "Four.", [("f", {"a": 1}), ("g", {})]),
    ),
}


def told(delta: AnswerDelta) -> tuple[str, str, list[Call]]:
    calls = [c["function"] for c in delta.tool_calls]
    return delta.reasoning, delta.content, [(c["name"], json.loads(c["arguments"])) for c in calls]


@pytest.mark.parametrize("name", CASES)
def test_whatever_the_pieces(name: str) -> None:
    style, text, right = CASES[name]
    parts = parse_answer(style, text, SPECIAL)
    assert told(AnswerDelta(parts.reasoning or "", parts.content, parts.tool_calls)) == right
    chance = random.Random(0)
    for longest in (1, 1, 3, 9, 40):
        reader, rest, found = AnswerStream(style, SPECIAL), text, AnswerDelta()
        while rest:
            size = chance.randint(1, longest)
            found, rest = found + reader.add(rest[:size]), rest[size:]
        assert told(found + reader.finish()) == right, longest


def test_text_comes_as_soon_as_it_is_certain() -> None:
    reader = AnswerStream(HERMES, opened=True)
    pieces = ["\nadd", " up", "\n</thi", "nk>\n\nFo", "ur <", "tool", "_box>"]
    deltas = [reader.add(piece) for piece in pieces]
    assert [d.reasoning for d in deltas] == ["add", " up", "", "", "", "", ""]
    assert [d.content for d in deltas] == ["", "", "", "Fo", "ur", "", " <tool_box>"]


def test_without_calls_they_are_content() -> None:
    for name, raw in (
        ("a call without its end", CASES["a call without its end"][1]),
        ("mistral", "[TOOL_CALLS]f"),
    ):
        style = CASES[name][0]
        reader = AnswerStream(style, with_calls=False)
        assert told(reader.add(raw) + reader.finish()) == ("", raw, [])


@pytest.mark.parametrize(
    ("source", "style"),
    [
        ("<tool_call> </think>", AnswerStyle("think", True, True, True)),
        ("<tool_call> <function=", AnswerStyle("think", False, True, False)),
        ("<tool_call> <arg_key>", AnswerStyle("think", False, True, False)),
        ('"parameters": ', AnswerStyle("think", False, True, False, True)),
        ("nothing", AnswerStyle()),
        ("<|channel|> <|message|> functions.", HARMONY),
        ("<|channel> <channel|> <|tool_call>", GEMMA),
        ("[THINK] [TOOL_CALLS]", MISTRAL),
    ],
)
def test_a_templates_style(source: str, style: AnswerStyle) -> None:
    assert AnswerStyle.of_template(source) == style

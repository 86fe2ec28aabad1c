"""Reading conversations: every form, every kind of bad line, and rows that are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftkit.data.conversations import (
    Conversation,
    Message,
    SkippedRows,
    iterate_conversations,
    read_conversations,
)
from draftkit.data.messages import WrittenTurn
from draftkit.errors import DataError

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "a list holds values"},
    {"role": "user", "content": "and a list?"},
    {"role": "assistant", "content": "assistant"},
]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_three_forms_become_one(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.jsonl",
        {"messages": TURNS, "id": "a", "domain": "chat"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"turns": ["first", "second"]},
    )
    openai, sharegpt, turns = read_conversations([path])
    assert (openai.id, openai.domain, len(openai.messages)) == ("a", "chat", 5)
    assert sharegpt.messages == (Message("user", "Hi"), Message("assistant", "Ho"))
    assert [m.role for m in turns.messages] == ["user", "user"]
    assert turns.domain == "mixed"
    assert read_conversations([path])[1].id == sharegpt.id, "made-up ids are stable"


def nested(levels: int) -> bytes:
    """A row whose schema has so many levels, and the row around it four more."""
    schema = b'{"a": ' * levels + b"1" + b"}" * levels
    return b'{"turns": ["x"], "tools": [{"function": {"name": "f", "parameters": ' + schema + b"}}]}\n"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "holds no conversation"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n{"messages": [', ":2: is not JSON .* cut off"),
        (b'{"messages": \n', ":1: is not JSON"),
        (b'{"turns": ["\xff"]}\n', r":1: is not UTF-8 \(byte 12\)"),
        (b"[1, 2]\n", ":1: is a list, must be a JSON object"),
        (b'{"text": "x"}\n', "needs one of the keys"),
        (b'{"messages": "x"}\n', "messages must be a list"),
        (b'{"messages": []}\n', "messages must be a list with at least one turn"),
        (b'{"messages": [{"role": "boss", "content": "x"}]}\n', r"messages\[0\]: role 'boss' is not known"),
        (b'{"messages": [{"role": "user", "content": 3}]}\n', "content must be a non-empty string"),
        (b'{"messages": [{"role": "user", "content": ""}]}\n', "content must be a non-empty string"),
        (b'{"messages": ["x"]}\n', r"messages\[0\]: is a str, must be an object"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "has no user turn"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n',
            r"messages\[0\]: content part of type 'image_url'",
        ),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": {"a": 1}}, {"role": "user", "content": '
            b'"x"}]}\n',
            "must be a list",
        ),
        (b'{"turns": ["x"], "tools": [{"name": 3}]}\n', r"tools\[0\] must be"),
        (b'{"turns": ["x"], "tools": "["}\n', "tools: is not JSON"),
        (
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": '
            b'[{"function": {"name": "f", '
            b'"arguments": "{"}}]}]}\n',
            r"messages\[1\]: tool_calls\[0\]: arguments: is not JSON",
        ),
        (
            b'{"turns": ["x"], "prompt_ids": [1], "answer_ids": [1, -2]}\n',
            "answer_ids must be a list of token ids",
        ),
        (
            b'{"turns": ["x"], "answers": [{"prompt_ids": "x", "answer_ids": [1]}]}\n',
            r"answers\[0\]: prompt_ids must be",
        ),
        (b'{"turns": ["x"], "switches": 3}\n', "switches is a int"),
        (
            b'{"conversations": [{"from": "boss", "value": "x"}]}\n',
            r"conversations\[0\]: from 'boss' is not known",
        ),
        (b'{"turns": ["x"], "id": [1]}\n', "id is a list"),
        (b'{"turns": ["a \\ud800"]}\n', r":1: holds half a character \('\\ud800'\)"),
        (b'{"turns": ["a"], "id": "\\udfff"}\n', ":1: holds half a character"),
        (b'{"turns": ["a"], "domain": "\\ud800"}\n', ":1: holds half a character"),
        (b'{"turns": ["x"], "id": ' + b"9" * 5000 + b"}\n", ":1: holds a number that is too long"),
        (b"[" * 10**5 + b"\n", ":1: is nested too deeply"),
        (nested(990), r":1: is nested too deeply for a conversation \(more than 100 levels\)"),
        (nested(97), ":1: is nested too deeply"),
        (
            b'{"turns": ["x"], "tools": "' + b"[" * 51 + b"]" * 51 + b'"}\n',
            r"tools: is nested too deeply for a conversation \(more than 50 levels\)",
        ),
        (b'{"turns": ["x"], "id": "a"}\n{"turns": ["y"], "id": "a"}\n', ":2: id 'a' was there before"),
    ],
)
def test_bad_lines_are_named(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read_conversations([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_schema_may_be_nested_as_deep_as_a_row_may(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_bytes(nested(96))
    assert read_conversations([tmp_path / "deep.jsonl"])[0].tools


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_conversations([tmp_path / "nothing.jsonl"])


CALL = {"id": "call_7", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
WEATHER = {"type": "function", "function": {"name": "weather"}}


def only(tmp_path: Path, row: object) -> Conversation:
    [found] = read_conversations([write(tmp_path / "one.jsonl", row)])
    return found


def test_openai_messages_keep_calls_results_reasoning_names_and_weights(tmp_path: Path) -> None:
    told = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Which"}, {"type": "text", "text": "weather?"}],
            "name": "ann",
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [CALL, CALL | {"id": "call_8"}],
            "reasoning": "look",
        },
        {"role": "tool", "tool_call_id": "call_7", "content": "sunny"},
        {"role": "assistant", "content": "Sunny.", "reasoning_content": "easy", "weight": 0},
    ]
    found = only(tmp_path, {"messages": told, "tools": [WEATHER]})
    assert found.tools == (WEATHER,)
    assert found.as_dicts() == [
        told[0],
        {"role": "user", "content": "Which\nweather?", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": told[2]["tool_calls"],
            "reasoning_content": "look",
        },
        told[3],
        told[4],
    ]


def test_sharegpt_with_functions_roles_of_openai_and_a_system_column(tmp_path: Path) -> None:
    said = [
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Which weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
        {"from": "observation", "value": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    found = only(tmp_path, {"conversations": said, "system": "Be brief.", "tools": '[{"name": "weather"}]'})
    assert [m.role for m in found.messages] == [
        "system",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.messages[3].tool_calls == (CALL | {"id": "call_0"},)
    assert found.tools == (WEATHER,)


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"prompt": "a", "response": "b"}, "user assistant"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "user assistant"),
        ({"prompt": "a"}, "user"),
        ({"instruction": "a", "input": "x", "output": "b"}, "user assistant"),
        ({"messages": None, "conversations": [{"from": "human", "value": "a"}]}, "user"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            "user assistant",
        ),
    ],
)
def test_other_forms(row: object, roles: str, tmp_path: Path) -> None:
    assert " ".join(m.role for m in only(tmp_path, row).messages) == roles


def test_null_is_absent_and_zero_is_an_id(tmp_path: Path) -> None:
    assert only(tmp_path, {"id": 0, "domain": None, "turns": ["x"]}).id == "0"
    assert only(tmp_path, {"id": None, "domain": None, "turns": ["x"]}).domain == "one"


def test_records_bring_their_token_ids(tmp_path: Path) -> None:
    flat = {"prompt_ids": [1, 2], "answer_ids": [3], "finish_reason": "length"}
    for row in ({"turns": ["x"], **flat}, {"turns": ["x"], "answers": [flat]}):
        found = only(tmp_path, row)
        assert (found.turns, found.cut) == ((WrittenTurn((1, 2), (3,), "length"),), True)
    assert only(tmp_path, {"prompt": "x", "answers": ["a", "b"]}).turns == (), (
        "a data set's own column of that name"
    )


def test_a_json_array_is_read(tmp_path: Path) -> None:
    rows = [{"id": "a", "messages": [{"role": "user", "content": "Hi"}]}, {"id": "b", "turns": ["Ho"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [c.id for c in read_conversations([tmp_path / "rows.json"])] == ["a", "b"]


def test_invalid_rows_are_left_out_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mixed.jsonl"
    good = [json.dumps({"turns": [f"{i}"]}) for i in range(3)]
    path.write_text(
        "\n".join([good[0], "{", *['{"text": 1}'] * 12, good[1], '{"turns": ["0"], "id": "x"}', good[2]])
        + "\n"
    )
    skipped = SkippedRows()
    assert len(list(iterate_conversations([path], skipped))) == 4
    assert skipped.count == 13
    skipped.report()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(f"left out: {path}:2: is not JSON") and lines[-1] == "left out: 13 rows in all"

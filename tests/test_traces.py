"""Logs become conversations: each format, repetitions, secrets, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftkit.data.conversations import read_conversations
from draftkit.data.traces import SPLITS, domain_of, make_traces
from draftkit.errors import DataError

ARGUMENTS = '{"city": "Bern"}'
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
ASKED = {"role": "user", "content": "Which weather?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "look it up"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
SAID = {"role": "assistant", "content": "Sunny."}
WHOLE = [ASKED, CALLED, RESULT, SAID]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def claude(kind: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "sessionId": "s1", "message": {"role": kind, "content": content, **fields}}


def codex(**payload: Any) -> dict[str, Any]:
    return {"type": "response_item", "payload": payload}


def parts(role: str, *given: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "parts": list(given)}


SPAN = {
    "gen_ai.input.messages": json.dumps(
        [
            parts("user", {"type": "text", "content": "Which weather?"}),
            parts(
                "assistant",
                {"type": "reasoning", "content": "look it up"},
                {"type": "tool_call", "id": "c1", "name": "weather", "arguments": {"city": "Bern"}},
            ),
            parts("tool", {"type": "tool_call_response", "id": "c1", "response": "sunny"}),
        ]
    ),
    "gen_ai.output.messages": json.dumps([parts("assistant", {"type": "text", "content": "Sunny."})]),
}
LOGS: dict[str, list[Any]] = {
    "bodies": [
        {"request": {"messages": WHOLE[:3], "tools": TOOLS}, "response": {"choices": [{"message": SAID}]}}
    ],
    "litellm": [
        {
            "messages": WHOLE[:3],
            "response": json.dumps({"choices": [{"message": SAID}]}),
            "model": "m",
            "model_parameters": {"tools": TOOLS},
        }
    ],
    "conversations": [{"messages": WHOLE, "tools": TOOLS}],
    "otel": [
        {
            "resourceSpans": [
                {
                    "scopeSpans": [
                        {
                            "spans": [
                                {
                                    "attributes": [
                                        {"key": k, "value": {"stringValue": v}} for k, v in SPAN.items()
                                    ]
                                }
                            ]
                        }
                    ]
                }
            ]
        }
    ],
    "otel, one span for each line": [{"name": "chat", "attributes": SPAN}],
    "claude-code": [
        {"type": "summary", "summary": "x"},
        claude("user", "Which weather?"),
        claude("assistant", [{"type": "thinking", "thinking": "look it up"}], id="m1"),
        claude(
            "assistant",
            [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}}],
            id="m1",
        ),
        claude(
            "user",
            [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]}],
        ),
        claude("assistant", [{"type": "text", "text": "Sunny."}], id="m2"),
    ],
    "codex": [
        {"type": "session_meta", "payload": {"id": "s1"}},
        codex(type="message", role="user", content=[{"type": "input_text", "text": "Which weather?"}]),
        codex(type="reasoning", summary=[{"type": "summary_text", "text": "look it up"}]),
        codex(type="function_call", name="weather", arguments=ARGUMENTS, call_id="c1"),
        codex(type="function_call_output", call_id="c1", output="sunny"),
        {"type": "event_msg", "payload": {"type": "token_count"}},
        codex(type="message", role="assistant", content=[{"type": "output_text", "text": "Sunny."}]),
    ],
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def kept(out: Path) -> list[Any]:
    files = [out / f"{split}.jsonl" for split in SPLITS]
    return read_conversations([f for f in files if f.stat().st_size])


@pytest.mark.parametrize("name", LOGS)
def test_each_format_gives_the_same_conversation(name: str, tmp_path: Path) -> None:
    report, skipped = make_traces([write(tmp_path / "log.jsonl", LOGS[name])], tmp_path / "out")
    known = "bodies" if name in ("litellm", "conversations") else name.split(",")[0]
    assert skipped.count == 0 and list(report.formats.values()) == [known]
    [found] = kept(tmp_path / "out")
    assert found.as_dicts() == WHOLE
    assert (found.domain, report.domains) == ("tool calls", {"tool calls": 1})


PROMPT = "".join(
    f"<|im_start|>{role}\n{said}<|im_end|>\n"
    for role, said in (("user", 'Hi <b>"you"</b>'), ("assistant", "Ho"), ("user", "It's again"))
)
OLD = (
    f"INFO 11-29 [logger.py:43] Received request chatcmpl-1: prompt: {PROMPT!r}, params: SamplingParams(n=1)."
)
NEW = [
    f"DEBUG 11-29 [logger.py:58] Request chatcmpl-1 details: prompt: {PROMPT!r}, prompt_token_ids: [1]",
    "INFO 11-29 [request_logger.py:70] Received request chatcmpl-1: params: SamplingParams(n=1).",
]
ANSWER = "INFO 11-29 [request_logger.py:94] Generated response chatcmpl-1: output: {!r}, "
ANSWER += "output_token_ids: [5], finish_reason: {}"


@pytest.mark.parametrize(
    ("lines", "said", "cut"),
    [
        (["INFO starting", OLD], [], False),
        (NEW, [], False),
        ([*NEW, ANSWER.format('I\'m \n"here"', "stop")], ['I\'m \n"here"'], False),
        ([*NEW, ANSWER.format("I am", "length")], ["I am"], True),
        ([*NEW, ANSWER.format("[tool_calls: weather({})]", "tool_calls")], [], False),
    ],
)
def test_vllms_log_holds_prompts_and_answers(
    lines: list[str], said: list[str], cut: bool, tmp_path: Path
) -> None:
    make_traces([write(tmp_path / "vllm.log", lines)], tmp_path / "out")
    [found] = kept(tmp_path / "out")
    assert [m.content for m in found.messages] == ['Hi <b>"you"</b>', "Ho", "It's again", *said]
    assert found.cut is cut


def test_no_end_is_learnt_from_answers_that_a_limit_cut(tmp_path: Path) -> None:
    """One in the middle, of which a shorter log says that it was cut, and the last one."""

    def body(messages: list[Any], answer: Any, reason: str) -> dict[str, Any]:
        return {
            "request": {"messages": messages},
            "response": {"choices": [{"message": answer, "finish_reason": reason}]},
        }

    half, on, whole = {"role": "assistant", "content": "Sun"}, {"role": "user", "content": "Go on."}, SAID
    rows = [body([ASKED], half, "length"), body([ASKED, half, on], whole, "stop")]
    rows.append(body([ASKED, half, on, whole, on], half, "length"))
    report, _ = make_traces([write(tmp_path / "log.jsonl", rows)], tmp_path / "out")
    [found] = kept(tmp_path / "out")
    assert [m.weight for m in found.messages] == [None, 0, None, None, None, None]
    assert (found.finish_reason, found.cut, report.cut, report.beginnings) == ("length", True, 2, 2)
    session = [
        claude("user", "Which weather?"),
        claude("assistant", [{"type": "text", "text": "Sun"}], id="m1", stop_reason="max_tokens"),
        claude("user", "Go on."),
        claude("assistant", [{"type": "text", "text": "Sun"}], id="m2", stop_reason="max_tokens"),
    ]
    make_traces([write(tmp_path / "session.jsonl", session)], tmp_path / "sessions")
    [found] = kept(tmp_path / "sessions")
    assert [m.weight for m in found.messages] == [None, 0, None, None] and found.cut
    said = json.dumps([parts("assistant", {"type": "text", "content": "Sun"}) | {"finish_reason": "length"}])
    span = {"name": "chat", "attributes": SPAN | {"gen_ai.output.messages": said}}
    make_traces([write(tmp_path / "span.jsonl", [span])], tmp_path / "spans")
    assert kept(tmp_path / "spans")[0].cut


@pytest.mark.parametrize(
    ("answer", "domain"),
    [
        ('{"tool": "price", "argument": "toner"}', "tool calls"),
        ('{"action": "Search", "action_input": {"query": "x"}}', "tool calls"),
        ('{"name": "weather", "arguments": {}}', "tool calls"),
        ('{"name": "Ada"}', "prose"),
        ('{"tool": "price", "argu', "prose"),
        ("<tool_call>\n{}\n</tool_call>", "tool calls"),
        ("<think>so</think>Yes.", "reasoning"),
        ("```python\nx\n```", "code"),
        ("Yes.", "prose"),
    ],
)
def test_an_answers_domain(answer: str, domain: str) -> None:
    assert domain_of([{"role": "user", "content": "{}"}, {"role": "assistant", "content": answer}]) == domain


def test_repetitions_and_beginnings_are_dropped_and_related_ones_stay_together(tmp_path: Path) -> None:
    def grown(user: str, turns: int) -> dict[str, Any]:
        return {
            "messages": [
                m
                for i in range(turns)
                for m in (
                    {"role": "user", "content": f"{user} {i}"},
                    {"role": "assistant", "content": f"answer {i}"},
                )
            ]
        }

    rows = [grown(f"user {u}", t) for u in range(200) for t in (1, 2, 3, 3)]
    elsewhere = [{"role": "user", "content": "elsewhere"}, {"role": "assistant", "content": "x"}]
    branch = grown("user 7", 1)["messages"] + elsewhere
    rows += [{"messages": branch}, {"messages": [ASKED]}, "{broken", "[" * 500 + "]" * 500, "[" * 10**5]
    report, skipped = make_traces([write(tmp_path / "log.jsonl", rows)], tmp_path / "out")
    assert (report.beginnings, report.repeated, report.without_answer, report.invalid) == (400, 200, 1, 3)
    assert sum(report.kept.values()) == 201 and all(report.kept.values())
    splits = {
        s: {c.messages[0].content for c in read_conversations([tmp_path / "out" / f"{s}.jsonl"])}
        for s in SPLITS
    }
    assert not splits["train"] & splits["heldout"] and not splits["train"] & splits["validation"]
    broken, *deep = skipped.first
    assert broken.startswith(f"{tmp_path / 'log.jsonl'}:803: is not JSON (Expecting property name")
    assert [":804: is nested too deeply" in deep[0], ":805: is nested" in deep[1]] == [True, True]


SECRETS = {
    "sk-abcdefghijklmnop1234": "<token>",
    "ghp_ABCDEFGHIJKLMNOPQRSTUV": "<token>",
    "AKIAABCDEFGHIJKLMNOP": "<token>",
    "ann.lee+x@example.org": "<mail address>",
    "Bearer abcdefghijklmnopqrst": "Bearer <bearer>",
    'password = "hunter2hunter2"': 'password = "<password>"',
    "-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----": "<private key>",
}


def test_secrets_are_masked_everywhere_unless_they_are_to_be_kept(tmp_path: Path) -> None:
    for number, (secret, mask) in enumerate(SECRETS.items()):
        said = {"role": "assistant", "content": f"It is {secret}.", "reasoning_content": secret}
        arguments = json.dumps({"text": secret})
        calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]
        rows = [{"messages": [{"role": "user", "content": secret}, {**said, "tool_calls": calls}]}]
        log = write(tmp_path / f"{number}.jsonl", rows)
        make_traces([log], tmp_path / "out")
        [found] = kept(tmp_path / "out")
        user, answer = found.messages
        assert (user.content, answer.content, answer.reasoning) == (mask, f"It is {mask}.", mask)
        assert secret not in json.dumps(json.loads(answer.tool_calls[0]["function"]["arguments"]))
        make_traces([log], tmp_path / "kept", keep_secrets=True)
        assert kept(tmp_path / "kept")[0].messages[0].content == secret


def test_a_log_of_no_known_format_says_what_was_looked_for(tmp_path: Path) -> None:
    log = write(tmp_path / "log.txt", ["GET /v1/models 200"])
    with pytest.raises(DataError, match=r"no log of a known format \(looked for bodies: .*codex: .*--format"):
        make_traces([log], tmp_path / "out")
    with pytest.raises(DataError, match="--format x: is not known"):
        make_traces([log], tmp_path / "out", "x")
    with pytest.raises(DataError, match="no conversation with an answer is left"):
        make_traces([write(tmp_path / "log.jsonl", [{"messages": [ASKED]}])], tmp_path / "out")

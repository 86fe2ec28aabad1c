"""Request fields: what is refused by name, what the answer carries, and which id it has."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from pydantic import ValidationError

from draftkit.engine.sampling_params import SamplingParams
from draftkit.serve import params as from_body
from draftkit.serve.choice import Choice
from draftkit.serve.problem import ApiError, from_validation, shorten
from draftkit.serve.prompt_scores import Echo
from draftkit.serve.protocol import ChatBody, CompletionBody, TokenizeBody
from draftkit.serve.reply import ChatReply, CompletionReply
from draftkit.target.answer_parts import AnswerStyle
from draftkit.target.answer_stream import AnswerStream
from draftkit.target.prompt_format import content_text
from support.fake_engine import fake_served, seam
from support.server import CHAT, Server, serving

SERVED = fake_served()
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"description": "adds", "name": "add", "parameters": {}}}
FORCED = {"tools": [TOOL], "tool_choice": "required"}
KINDS: dict[str, Any] = {CHATS: ChatBody, TEXTS: CompletionBody, "/tokenize": TokenizeBody}
LEAST = {CHATS: CHAT, TEXTS: {"prompt": "a"}, "/tokenize": {"prompt": "a"}}


def chosen(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def refused(path: str, fields: dict[str, Any]) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        KINDS[path].model_validate_json(json.dumps({**LEAST[path], **fields}))
    return from_validation(caught.value)


@pytest.mark.parametrize("path", [CHATS, TEXTS])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": -1},
        {"prompt_logprobs": 21},
        {"use_beam_search": True},
        {"bad_words": "x"},
        {"bad_words": ["x"] * 300},
        {"guided_choice": ["yes", "no"]},
        {"guided_json": {"type": "object"}},
        {"guided_regex": "a+"},
        {"guided_grammar": "root ::= 'a'"},
        {"regex": "a+"},
        {"ebnf": "root ::= 'a'"},
        {"json_schema": "{}"},
        {"logprob_token_ids": [1]},
        {"prompt_embeds": "AAAA"},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"thinking_token_budget": 0},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": -2},
        {"truncation_side": "middle"},
        {"request_id": "two words"},
        {"request_id": "x" * 200},
        {"max_tokens": 0},
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused_by_name(path: str, fields: dict[str, Any]) -> None:
    error = refused(path, fields)
    [name] = fields
    assert (error.status, error.param) == (400, name) and name in str(error)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "bad_words": [],
            "use_beam_search": False,
            "logits_processors": [],
            "audio": None,
            "modalities": ["text"],
        },
        {
            "function_call": "none",
            "functions": [],
            "structured_outputs": None,
            "suffix": "",
            "include_reasoning": False,
        },
    ],
)
def test_fields_that_ask_for_nothing_are_no_reason_to_refuse(fields: dict[str, Any]) -> None:
    for path, kind in KINDS.items():
        kind.model_validate_json(json.dumps({**LEAST[path], **fields}))


@pytest.mark.parametrize(
    ("path", "fields", "param", "says"),
    [
        (TEXTS, {"prompt": 5}, "prompt", "a text, a list of texts"),
        (TEXTS, {"prompt": [1, "a"]}, "prompt", "a text, a list of texts"),
        (TEXTS, {"prompt": [1, -1]}, "prompt", "whole numbers from 0"),
        (
            CHATS,
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content",
            "a text or a list of parts",
        ),
        (
            CHATS,
            {"messages": [{"role": "user", "content": ["x"]}]},
            "messages.0.content",
            "a text or a list of parts",
        ),
        (CHATS, {"tools": [TOOL], "tool_choice": "bogus"}, "tool_choice", "'auto', 'none', 'required'"),
        (
            CHATS,
            {"tools": [TOOL], "tool_choice": {"type": "function"}},
            "tool_choice",
            "'auto', 'none', 'required'",
        ),
        (
            CHATS,
            {"tools": [TOOL], "tool_choice": chosen("mul")},
            "tool_choice",
            "'mul', which is not among tools",
        ),
        (CHATS, {"tool_choice": "required"}, "tool_choice", "needs tools"),
        (CHATS, {"tool_choice": chosen("add")}, "tool_choice", "needs tools"),
        (CHATS, FORCED | {"response_format": {"type": "json_object"}}, "tool_choice", "another form"),
        (CHATS, FORCED | {"structured_outputs": {"regex": "a"}}, "tool_choice", "another form"),
        (CHATS, FORCED | {"allowed_token_ids": [5]}, "tool_choice", "allowed_token_ids"),
        (CHATS, {"tools": [{"bad": 1}]}, "tools.0", '"function"'),
        (CHATS, {"tools": [TOOL, {"type": "function", "function": {}}]}, "tools.1", '"name"'),
        (CHATS, {"tools": [{**TOOL, "type": "web_search"}]}, "tools.0", '"function"'),
        (CHATS, {"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        (TEXTS, {"structured_outputs": {"json": [1]}}, "structured_outputs.json", "as an object or as text"),
        (TEXTS, {"prompt": ["a"] * 1025}, "prompt", "1025 prompts are more than the 1024"),
        (
            TEXTS,
            {"logit_bias": {str(i): 1 for i in range(16_385)}},
            "logit_bias",
            "16385 entries are more than 16384",
        ),
        (CHATS, {"echo": True}, "echo", "/v1/completions"),
        (
            CHATS,
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "both",
        ),
        (CHATS, {"chat_template": "{{ messages }}"}, "chat_template", "own template"),
        (
            CHATS,
            {"allowed_token_ids": [5], "response_format": {"type": "json_object"}},
            "allowed_token_ids",
            "combined",
        ),
        (TEXTS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        (CHATS, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "stream"),
        (TEXTS, {"max_tokens": 0}, "max_tokens", "echo"),
        ("/tokenize", {"messages": CHAT["messages"]}, "prompt", "either"),
        ("/tokenize", {"chat_template": "x"}, "chat_template", "own template"),
        ("/tokenize", {"tools": [{}]}, "tools.0", '"function"'),
    ],
    ids=str,
)
def test_a_refusal_is_one_sentence_about_the_field(
    path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    error = refused(path, fields)
    assert error.param == param and says in str(error) and "more)" not in str(error)


def test_allowed_tokens_go_with_the_text_format() -> None:
    CompletionBody.model_validate(
        {"prompt": "a", "allowed_token_ids": [5], "response_format": {"type": "text"}}
    )


@pytest.mark.parametrize(
    "name", "self messages tools add_generation_prompt continue_final_message tokenize padding".split()
)
def test_template_kwargs_cannot_set_what_the_server_sets(server: Server, name: str) -> None:
    answer = server.http.post(CHATS, json={**CHAT, "chat_template_kwargs": {name: []}})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "chat_template_kwargs") and name in error["message"]


def test_tools_are_refused_where_the_template_would_leave_them_out(server: Server) -> None:
    error = server.http.post(CHATS, json={**CHAT, "tools": [TOOL]}).json()["error"]
    assert (error["code"], error["param"]) == (400, "tools") and "template" in error["message"]
    assert (
        server.http.post("/tokenize", json={"messages": CHAT["messages"], "tools": [TOOL]}).status_code == 400
    )
    assert server.http.post(CHATS, json={**CHAT, "tools": [TOOL], "tool_choice": "none"}).status_code == 200
    assert server.http.post(CHATS, json={**CHAT, "tools": []}).status_code == 200


def test_tools_reach_a_template_that_has_them_as_they_came() -> None:
    tokenizer = copy.copy(SERVED.tokenizer)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    body = ChatBody.model_validate({**CHAT, "tools": [TOOL]})
    ids = from_body.chat_prompt(
        body.messages, replace(SERVED, tokenizer=tokenizer), tools=body.tools, most_tokens=999
    )
    assert tokenizer.decode(ids) == json.dumps(TOOL)


def choice_that_says(text: str) -> Choice:
    choice = Choice(SERVED.texts, SamplingParams(), 1)
    events = tuple(
        seam.TokenEvent(t, "target") for t in SERVED.tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    choice.add(seam.StepOutput("r", events, (), "length", None, seam.RequestStats()))
    return choice


def test_without_parallel_calls_the_first_one_is_given_alone() -> None:
    call = '<tool_call>{"name": "%s", "arguments": {}}</tool_call>'
    text = call % "first" + call % "second" + "<tool_call>" + '{"name": "third"}'
    hermes = partial(AnswerStream, AnswerStyle())
    for one_call, names in ((False, ["first", "second", "third"]), (True, ["first"])):
        message = ChatReply(SERVED.texts, False, hermes, one_call).whole(
            0, choice_that_says(text), [], Echo()
        )["message"]
        assert [c["function"]["name"] for c in message["tool_calls"]] == names and message["content"] is None
        reply, choice = (
            ChatReply(SERVED.texts, False, hermes, one_call),
            Choice(SERVED.texts, SamplingParams(), 1),
        )
        streamed: list[Any] = []
        for token in SERVED.tokenizer(text, add_special_tokens=False)["input_ids"]:
            output = seam.StepOutput(
                "r", (seam.TokenEvent(token, "target"),), (), None, None, seam.RequestStats()
            )
            chunk = reply.chunk(0, choice, choice.add(output))
            streamed += (chunk or {"delta": {}})["delta"].get("tool_calls", [])
        last = reply.chunk(
            0, choice, choice.add(seam.StepOutput("r", (), (), "stop", None, seam.RequestStats()))
        )
        assert last is not None and last["finish_reason"] == "tool_calls"
        assert [c["function"]["name"] for c in streamed + last["delta"].get("tool_calls", [])] == names


def test_a_refusal_in_the_history_is_text() -> None:
    body = ChatBody.model_validate(
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "refusal", "refusal": "no"}, {"type": "text", "text": "!"}],
                }
            ]
        }
    )
    assert content_text(body.messages[0].as_dict()["content"]) == "no\n!"


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({}, (1, 2, 3, 4, 5)),
        ({"truncate_prompt_tokens": 2}, (4, 5)),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, (4, 5)),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, (1, 2)),
        ({"truncate_prompt_tokens": -1}, (3, 4, 5)),  # a context of 10 less an answer of 7
        ({"truncate_prompt_tokens": -1, "truncation_side": "right"}, (1, 2, 3)),
    ],
    ids=str,
)
def test_prompts_are_cut_on_the_side_that_was_asked_for(
    fields: dict[str, Any], left: tuple[int, ...]
) -> None:
    body = CompletionBody.model_validate({"prompt": "a", **fields})
    assert from_body.truncated((1, 2, 3, 4, 5), body, 10, 7) == left


def test_a_prompt_that_is_too_long_fits_when_it_may_be_cut(server: Server) -> None:
    long = {"prompt": "a b c " * 1000, "temperature": 0, "truncate_prompt_tokens": -1}
    for limit in (16, 100):
        usage = server.http.post(TEXTS, json={**long, "max_tokens": limit}).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (512 - limit, limit)
    assert server.http.post(TEXTS, json=long).json()["usage"]["total_tokens"] == 512
    chat = {"messages": [{"role": "user", "content": long["prompt"]}], "truncate_prompt_tokens": -1}
    assert server.http.post(CHATS, json=chat).json()["usage"]["total_tokens"] == 512


def test_a_limit_that_the_context_cannot_hold_is_refused_under_its_own_name(server: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.http.post(CHATS, json={**CHAT, name: 10**6})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        cut = server.http.post(CHATS, json={**CHAT, name: 10**6, "truncate_prompt_tokens": -1})
        assert cut.json() == answer.json()


def chunks(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    lines = server.http.post(path, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_token_ids_of_a_chat_stand_where_vllm_has_them(server: Server) -> None:
    body = {**CHAT, "return_token_ids": True, "max_tokens": 9}
    whole = server.http.post(CHATS, json=body).json()
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert "prompt_token_ids" not in whole["choices"][0] and len(whole["choices"][0]["token_ids"]) == 9
    first, *others = chunks(server, CHATS, body)
    assert (
        first["prompt_token_ids"] == whole["prompt_token_ids"]
        and first["choices"][0]["delta"]["role"] == "assistant"
    )
    assert not [c for c in others if "prompt_token_ids" in c or "prompt_token_ids" in c["choices"][0]]
    assert [t for c in others for t in c["choices"][0]["token_ids"]] == whole["choices"][0]["token_ids"]
    assert "prompt_token_ids" not in server.http.post(CHATS, json=CHAT).json()


@pytest.mark.parametrize("echo", [False, True])
def test_token_ids_of_completions_stand_in_their_choice(server: Server, echo: bool) -> None:
    body = {
        "prompt": ["one", "two words"],
        "temperature": 0,
        "max_tokens": 9,
        "return_token_ids": True,
        "echo": echo,
    }
    whole = server.http.post(TEXTS, json=body).json()
    assert (
        "prompt_token_ids" not in whole
        and sum(len(c["prompt_token_ids"]) for c in whole["choices"]) == (whole["usage"]["prompt_tokens"])
    )
    streamed = [chunk["choices"][0] for chunk in chunks(server, TEXTS, body)]
    for choice in whole["choices"]:
        first, *others = [c for c in streamed if c["index"] == choice["index"]]
        assert first["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not [c for c in others if "prompt_token_ids" in c]
        assert [t for c in [first, *others] for t in c["token_ids"]] == choice["token_ids"]
        assert "".join(c["text"] for c in [first, *others]) == choice["text"]


@pytest.mark.parametrize(("asked", "names"), [(0, 1), (1, 2), (2, 3)])
def test_the_drawn_token_is_always_among_the_top_ones_of_completions(asked: int, names: int) -> None:
    drawn, *likely = SERVED.tokenizer("a b c", add_special_tokens=False)["input_ids"][:3]
    event = seam.TokenEvent(drawn, "target", -9.0, tuple((t, -0.5) for t in likely[:asked]))
    choice = Choice(SERVED.texts, SamplingParams(logprobs=asked), 1)
    pieces = choice.add(seam.StepOutput("r", (event,), (), "length", None, seam.RequestStats())).pieces
    told = CompletionReply(SERVED.texts, False).whole(0, choice, pieces, Echo())["logprobs"]
    assert len(told["top_logprobs"][0]) == names and told["top_logprobs"][0][told["tokens"][0]] == -9.0


def test_a_body_may_name_its_request_and_the_header_goes_before_it(server: Server) -> None:
    answer = server.http.post(TEXTS, json={"prompt": "a", "request_id": "mine.1"})
    assert (answer.json()["id"], answer.headers["x-request-id"]) == ("cmpl-mine.1", "mine.1")
    assert "POST /v1/completions 200" in server.logged("mine.1 ")
    answer = server.http.post(CHATS, json={**CHAT, "request_id": "body"}, headers={"X-Request-Id": "header"})
    assert answer.json()["id"] == "chatcmpl-header" and answer.headers["x-request-id"] == "header"


@pytest.mark.parametrize(("path", "known"), [(TEXTS, "echo"), (CHATS, "tools"), ("/tokenize", "messages")])
def test_unknown_fields_are_ignored_and_named_in_the_log(server: Server, path: str, known: str) -> None:
    """`speculative` for `draft` changed nothing, and nothing said so."""
    name = f"named{path.replace('/', '.')}"
    quiet = {known: None, "use_beam_search": False, "suffix": ""}
    if path != "/tokenize":
        quiet["return_spec_tokens_details"] = False  # another name of return_spec_stats
    body = {**LEAST[path], **quiet, "speculative": False, "evil\x1b[2J" + "x" * 5000: 1}
    answer = server.http.post(path, json=body, headers={"X-Request-Id": name})
    line = server.logged(f"{name} ")
    assert answer.status_code == 200 and "ignored (2)" in line and "'speculative'" in line
    assert "\\x1b[2Jxxx" in line and "\x1b" not in line
    assert len(line) < 300


def test_an_empty_model_name_is_none(server: Server) -> None:
    assert server.http.post(TEXTS, json={"prompt": "a", "model": ""}).status_code == 200


def test_long_paths_and_names_are_cut_in_the_log_and_in_errors(server: Server) -> None:
    answer = server.http.get("/" + "p" * 5000, headers={"X-Request-Id": "long-path"})
    assert answer.status_code == 404 and len(answer.text) < 400
    assert "404" in server.logged("long-path ") and len(server.logged("long-path ")) < 400
    assert len(server.http.post(TEXTS, json={"prompt": "a", "model": "m" * 5000}).text) < 400
    assert shorten("a" * 200) == "a" * 200 and len(shorten("a" * 201)) == 203

"""The API over a stand-in engine in a real server process: the openai client, wrong requests, statistics,
metrics."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.patience import PATIENCE
from support.server import CHAT, TEXT, Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--step-seconds", "0.002", "--max-body-bytes", "200000") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=server.url + "/v1",
        api_key="any",
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=PATIENCE),
    )


def test_openai_client_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (TEXT, "assistant", "stop")
    assert answer.usage is not None and answer.usage.total_tokens == (
        answer.usage.prompt_tokens + answer.usage.completion_tokens
    )
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert b"".join(bytes(t.bytes or []) for t in choice.logprobs.content[:-1]).decode() == TEXT
    assert all(len(t.top_logprobs) == 2 for t in choice.logprobs.content)


def test_openai_client_chat_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {0: TEXT, 1: TEXT} and reasons == {0: "stop", 1: "stop"}
    assert usage is not None and usage.completion_tokens > 100


def test_openai_client_completions_with_stop_string_echo_and_list_of_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="fake", prompt=["one", "two"], max_tokens=60, temperature=0, stop=["jumps", "nope"], echo=True
    )
    expected = TEXT[: TEXT.index("jumps")]
    assert [c.text for c in answer.choices] == ["one" + expected, "two" + expected]
    assert [c.finish_reason for c in answer.choices] == ["stop", "stop"]
    assert [c.model_extra["stop_reason"] for c in answer.choices if c.model_extra] == ["jumps", "jumps"]
    streamed = client.completions.create(
        model="fake", prompt="one", max_tokens=60, temperature=0, stop="jumps", stream=True
    )
    assert "".join(c.choices[0].text for c in streamed if c.choices) == expected


def test_token_ids_in_give_token_ids_out_and_include_stop_shows_the_stop(server: Server) -> None:
    ids = server.http.post("/tokenize", json={"prompt": TEXT[:30]}).json()["tokens"]
    body = {"prompt": ids, "max_tokens": 20, "temperature": 0, "return_token_ids": True, "stop": "brown"}
    choice = server.http.post("/v1/completions", json={**body, "include_stop_str_in_output": True}).json()[
        "choices"
    ][0]
    assert choice["text"] == "The quick brown" and choice["prompt_token_ids"] == ids
    text = server.http.post("/detokenize", json={"tokens": choice["token_ids"]}).json()["prompt"]
    assert text.startswith("The quick brown") and len(text) <= len("The quick brown") + 8
    stop = ids[3]
    choice = server.http.post(
        "/v1/completions", json={**body, "stop": None, "stop_token_ids": [stop]}
    ).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["token_ids"][-1] == stop and len(choice["token_ids"]) == 4


def test_statistics_of_speculation_come_when_asked(server: Server) -> None:
    plain = server.http.post("/v1/chat/completions", json=CHAT).json()
    asked = server.http.post("/v1/chat/completions", json={**CHAT, "return_spec_stats": True}).json()
    assert "metrics" not in plain
    stats = asked["metrics"]["speculative_decoding"]
    assert stats["mean_acceptance_length"] == 1 + stats["num_accepted_draft_tokens"] / stats["num_spec_steps"]
    assert stats["num_draft_tokens"] == 4 * stats["num_spec_steps"] > stats["num_verified_tokens"]
    without = server.http.post(
        "/v1/chat/completions", json={**CHAT, "return_spec_stats": True, "draft": False}
    ).json()
    assert without["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0


def test_stream_tells_where_tokens_came_from(server: Server) -> None:
    body = {**CHAT, "stream": True, "return_token_origins": True, "max_tokens": 10}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    choices = [c for d in data[:-1] for c in json.loads(d)["choices"] if "origins" in c]
    tokens = [t for c in choices for t in c["origins"]["tokens"]]
    assert len(tokens) == 10 and [t[1] for t in tokens[:4]] == ["target", "accepted", "accepted", "target"]
    assert TEXT.startswith("".join(t[0] for t in tokens))
    assert all(len(c["origins"]["rejected"]) == 1 for c in choices[1:])


BAD = [
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "model": "other"}, 404, "model"),
    ("/v1/chat/completions", {**CHAT, "temperature": -1}, 400, "temperature"),
    ("/v1/chat/completions", {**CHAT, "top_p": 0}, 400, "top_p"),
    ("/v1/chat/completions", {**CHAT, "n": 0}, 400, "n"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 10**9}, 400, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "min_tokens": 9, "max_tokens": 3}, 400, "min_tokens"),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", {**CHAT, "stop_token_ids": [10**7]}, 400, "stop_token_ids"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 3}, 400, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, "response_format.type"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages",
    ),
    ("/v1/chat/completions", {**CHAT, "seed": 666}, 400, None),
    ("/v1/completions", {"prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("/v1/completions", {"prompt": [1, 10**8]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a b c " * 1000}, 400, "input_tokens"),
    ("/v1/completions", {"prompt": "a", "n": 128, "best_of": 200}, 400, "best_of"),
    ("/v1/completions", {"prompt": ["a"] * 300}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "prompt_logprobs": 30}, 400, "prompt_logprobs"),
    ("/tokenize", {}, 400, "prompt"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
    ("/detokenize", {"tokens": [10**8]}, 400, "tokens"),
    ("/v1/completions", {"prompt": "x" * 300_000}, 413, None),
    ("/v1/nothing", {}, 404, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_bad_requests_get_a_body_that_names_the_field(
    server: Server, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = server.http.post(path, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert error["param"] == param
    assert "\n" not in error["message"] and error["message"]


@pytest.mark.parametrize(
    ("raw", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 10000, "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a", "seed": 1e999}', "application/json", 400),
        (b'"prompt"', "application/json", 400),
        (b"", "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
    ],
)
def test_bodies_that_are_not_json_objects_are_refused(
    server: Server, raw: bytes, kind: str, status: int
) -> None:
    assert (
        server.http.post("/v1/completions", content=raw, headers={"content-type": kind}).status_code == status
    )


def test_the_context_limit_reads_as_vllm_writes_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"This model's maximum context length is 512 tokens"):
        client.completions.create(model="fake", prompt="a b c " * 1000)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-none", prompt="a")


def test_request_ids_are_in_the_header_the_body_and_the_log(server: Server) -> None:
    response = server.http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "my-id.1"})
    assert response.headers["x-request-id"] == "my-id.1" and response.json()["id"] == "chatcmpl-my-id.1"
    assert "POST /v1/chat/completions 200" in server.logged("my-id.1 ")
    assert (
        server.http.get("/version", headers={"X-Request-Id": "evil id"}).headers["x-request-id"] != "evil id"
    )


def test_models_health_version_and_openapi(server: Server, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    assert server.http.get("/v1/models/none").status_code == 404
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/version").json()["version"]
    described = server.http.get("/openapi.json").json()
    assert "messages" in json.dumps(described["components"]["schemas"]["ChatBody"])


def test_metrics_parse_and_count(server: Server) -> None:
    server.http.post("/v1/chat/completions", json=CHAT)
    families = {f.name: f for f in text_string_to_metric_families(server.http.get("/metrics").text)}
    for name in (
        "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds request_success "
        "spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_verified_tokens draft_seconds "
        "spec_decode_num_wasted_tokens spec_decode_num_accepted_tokens_per_pos step_verified_tokens "
        "verify_seconds "
        "step_drafted_tokens spec_decode_accepted_length kv_cache_usage_perc confidence_calibration_error "
        "num_requests_running num_requests_waiting generation_tokens prompt_tokens num_preemptions"
    ).split():
        assert f"draftkit:{name}" in families, name
    ours = [s for f in families.values() for s in f.samples if s.name.startswith("draftkit:")]
    assert ours and all(s.labels["model_name"] == "fake" for s in ours)
    drafted = server.metric("spec_decode_num_draft_tokens_total")
    verified = server.metric("spec_decode_num_verified_tokens_total")
    accepted = server.metric("spec_decode_num_accepted_tokens_total")
    assert drafted > verified > accepted > 0
    assert verified == accepted + server.metric("spec_decode_num_wasted_tokens_total")
    assert server.metric("spec_decode_num_accepted_tokens_per_pos_total") == accepted


def test_an_answer_that_a_stop_string_ends_is_a_finished_request(server: Server) -> None:
    names = ("request_success_total", "e2e_request_latency_seconds_count", "prompt_tokens_total")
    for stream in (False, True):
        before = [server.metric(name) for name in names]
        body = CHAT | {"stop": "quick", "max_tokens": 100, "stream": stream}
        text = server.http.post("/v1/chat/completions", json=body).text
        assert '"finish_reason":"stop"' in text.replace(" ", "") and "brown" not in text
        grown = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
        assert grown[:2] == [1, 1] and grown[2] > 0


def test_the_page_is_sent_whole_also_when_a_part_is_asked_for(server: Server) -> None:
    whole = server.http.get("/chat.js")
    assert whole.status_code == 200 and "javascript" in whole.headers["content-type"]
    for part in ("bytes=0-3", "bytes=999999999-", "B"):
        answer = server.http.get("/chat.js", headers={"Range": part})
        assert (answer.status_code, answer.content) == (200, whole.content)


@pytest.mark.parametrize("options", [{"include_usage": True}, {"continuous_usage_stats": True}])
def test_usage_that_was_not_asked_for_whole_is_not_in_every_chunk(
    server: Server, options: dict[str, bool]
) -> None:
    chunks = streamed(server, {"stream_options": options})
    assert [bool(c.get("usage")) for c in chunks] == [False] * (len(chunks) - 1) + [
        "include_usage" in options
    ]


def test_continuous_usage_is_in_every_chunk(server: Server) -> None:
    chunks = streamed(server, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    made = [c["usage"]["completion_tokens"] for c in chunks]
    assert made[0] == 0 and made == sorted(made) and made[-1] > 100


def streamed(server: Server, fields: dict[str, object]) -> list[dict[str, Any]]:
    text = server.http.post("/v1/chat/completions", json={**CHAT, "stream": True, **fields}).text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_a_body_that_is_packed_is_refused_by_name(server: Server) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "br"}
    answer = server.http.post("/v1/completions", content=gzip.compress(b'{"prompt": "a"}'), headers=headers)
    assert answer.status_code == 415 and "br" in answer.json()["error"]["message"]


def test_the_list_of_models_may_end_with_a_slash(server: Server) -> None:
    assert server.http.get("/v1/models/").json() == server.http.get("/v1/models").json()


def test_head_answers_as_get_without_a_body(server: Server) -> None:
    for path in ("/", "/chat.css", "/health", "/ready", "/metrics", "/version", "/v1/models", "/nothing"):
        get, head = server.http.get(path), server.http.head(path)
        assert (head.status_code, head.headers["content-type"]) == (
            get.status_code,
            get.headers["content-type"],
        )
        assert head.content == b""
        assert path == "/metrics" or head.headers["content-length"] == get.headers["content-length"] != "0"
    assert server.http.head("/v1/completions").status_code == 405


def test_every_metric_is_described(server: Server) -> None:
    server.http.post("/v1/chat/completions", json=CHAT)
    text = (Path(__file__).parents[1] / "docs" / "measuring.md").read_text("utf-8").split("## Metrics")[1]
    families = [
        f.name.removeprefix("draftkit:")
        for f in text_string_to_metric_families(server.http.get("/metrics").text)
    ]
    assert [name for name in families if f"`{name}`" not in text and not name.endswith("_created")] == []
    assert len(families) > 30

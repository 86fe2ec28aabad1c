"""What `draftkit bench` makes of a stream: chunks, usages, events and counters."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from draftkit.serve import load
from draftkit.serve.bench import summarise
from draftkit.serve.load import Endpoint, Record
from draftkit.serve.settings import LoadSettings

SETTINGS = LoadSettings(prompts=("one", "two", "three"), requests=6, warmup=1, max_tokens=31)


def ask(text: str) -> Record:
    """What is measured about an answer whose stream is `text`."""

    async def run() -> Record:
        endpoint = Endpoint("http://x/v1/", None, SETTINGS)
        endpoint._http = httpx.AsyncClient(
            transport=httpx.MockTransport(lambda request: httpx.Response(200, text=text))
        )
        return await endpoint.ask("hello")

    return asyncio.run(run())


def test_chunks_of_several_tokens_count_as_tokens_with_or_without_running_usage() -> None:
    def stream(running: bool) -> str:
        lines = [
            {"choices": [{"delta": {"content": "ab"}}], "usage": {"completion_tokens": 2 * i}}
            for i in range(1, 4)
        ]
        if not running:
            for line in lines:
                del line["usage"]
        lines.append({"choices": [], "usage": {"completion_tokens": 6, "prompt_tokens": 4}})
        return "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"

    told, guessed = ask(stream(True)), ask(stream(False))
    assert (told.output_tokens, len(told.gaps), told.prompt_tokens) == (6, 4, 4)
    assert (guessed.output_tokens, len(guessed.gaps), guessed.chunks) == (6, 5, 3)
    assert told.usage_told and guessed.usage_told


def clocked(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """What the load's clock shows, reading by reading."""
    left = iter(seconds)
    monkeypatch.setattr(load, "time", SimpleNamespace(perf_counter=lambda: next(left)))


def test_a_usage_with_the_finish_reason_counts_the_chunks_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of four tokens each and an end that says so: 0.2 s for the tokens after the first."""
    clocked(monkeypatch, 0.0, 1.0, 1.1, 1.2, 1.3, 1.3)
    text, end = {"delta": {"content": "abcd"}}, {"delta": {}, "finish_reason": "length"}
    usage = {"completion_tokens": 12}
    lines = [*[{"choices": [text]}] * 3, {"choices": [end], "usage": usage}]
    answer = ask("".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n")
    assert (answer.output_tokens, answer.chunks, answer.first) == (12, 3, 1.0)
    assert answer.gaps == pytest.approx([0.2 / 11] * 11), "not a few gaps of chunks and many of nothing"


def test_the_first_chunk_of_several_tokens_leaves_the_later_gaps_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocked(monkeypatch, 0.0, 1.0, 1.1, 1.3, 1.3)
    lines = [{"choices": [{"delta": {"content": "a"}}], "usage": {"completion_tokens": n}} for n in (3, 4, 5)]
    answer = ask("".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n")
    assert answer.gaps == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_end_where_the_format_says_and_not_inside_a_text(end: str) -> None:
    line = json.dumps({"choices": [{"delta": {"content": "a\u2028b\u0085c\x0bd"}}]}, ensure_ascii=False)
    answer = ask(f"data: {line}{end}{end}data: [DONE]{end}{end}")
    assert (answer.error, answer.output_tokens) == (None, 1)


def test_an_error_that_is_null_is_none() -> None:
    answer = ask('data: {"error": null, "choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n')
    assert (answer.error, answer.output_tokens) == (None, 1)


def test_counters_are_read_with_and_without_a_time_and_other_text_is_no_failure() -> None:
    lines = [
        "# TYPE vllm:spec_decode_num_drafts_total counter",
        'vllm:spec_decode_num_drafts_total{engine="0",model_name="a } b"} 3 1700000000000',
        'vllm:spec_decode_num_drafts_total{engine="1",model_name="a } b"} 4',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 9',
        "llamacpp:spec_decode_num_draft_tokens_total 12 1700000000000",
        "this line is nobody's",
    ]

    async def counters(text: str) -> dict[str, float]:
        endpoint = Endpoint("http://x", None, SETTINGS)
        endpoint._http = httpx.AsyncClient(
            transport=httpx.MockTransport(lambda request: httpx.Response(200, text=text))
        )
        return await endpoint.counters()

    found = {"spec_decode_num_drafts_total": 7.0, "spec_decode_num_draft_tokens_total": 12.0}
    assert asyncio.run(counters("\n".join(lines))) == found
    for odd in (
        'a:spec_decode_num_drafts_total{b="c"} oops',
        "spec_decode_num_drafts_total",
        "spec_decode_num_ {",
        "<html>",
    ):
        assert asyncio.run(counters(odd)) == {}, odd


@pytest.mark.parametrize(
    "usage", [*({"completion_tokens": bad} for bad in (None, "9", True, -1, 0.5, [9])), "9", [9]]
)
def test_a_usage_without_a_number_counts_as_none(usage: Any) -> None:
    line = json.dumps({"choices": [{"delta": {"content": "a"}}], "usage": usage})
    answer = ask(f"data: {line}\n\n" * 3 + "data: [DONE]\n\n")
    assert (answer.error, answer.output_tokens, answer.prompt_tokens, answer.usage_told) == (
        None,
        3,
        0,
        False,
    )
    odd = ask('data: {"choices": [7]}\n\ndata: [DONE]\n\n')
    assert odd.error is not None and odd.error.startswith("AttributeError")


@pytest.mark.parametrize("space", ["", " "])
def test_the_space_after_data_is_optional(space: str) -> None:
    answer = ask(f'data:{space}{{"choices": [{{"delta": {{"content": "a"}}}}]}}\n\ndata:{space}[DONE]\n\n')
    assert (answer.error, answer.output_tokens) == (None, 1)


def test_an_answer_that_nobody_ended_has_failed() -> None:
    text = 'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'
    assert ask(text).error == "the stream ended early"
    assert ask(text + "data: [DONE]\n\n").error is None
    assert ask(text + 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n').error is None
    assert ask(text + 'data: {"error": "mid"}\n\n').error == "mid"
    assert ask("data: [DONE]\n\n").error == "the answer had no tokens"
    assert summarise([ask(text)], 1.0, {})["failed"] == 1

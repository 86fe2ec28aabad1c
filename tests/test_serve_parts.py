"""Parts of the server without a process: answers in the making, tool calls, bodies, metrics, drain of the
worker."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from draftkit.engine.sampling_params import SamplingParams
from draftkit.errors import ServeError, TargetError
from draftkit.serve import params as from_body
from draftkit.serve import worker as worker_module
from draftkit.serve.choice import Choice
from draftkit.serve.detokenize import TokenTexts
from draftkit.serve.metrics import ServerMetrics
from draftkit.serve.problem import ApiError, from_validation
from draftkit.serve.prompt_scores import Echo
from draftkit.serve.protocol import ChatBody, CompletionBody
from draftkit.serve.reply import ChatReply, CompletionReply, usage
from draftkit.serve.settings import ServeSettings
from draftkit.serve.stream import ClientLeft, EventStream
from draftkit.serve.worker import Worker
from draftkit.target.answer_parts import AnswerStyle
from draftkit.target.answer_stream import AnswerDelta, AnswerStream
from support.fake_engine import FakeEngine, fake_served, seam
from support.patience import PATIENCE

SERVED = fake_served()
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
STATS = seam.RequestStats(1, 0, 0, 0, 0, 0, 0, (), 0.0, 0.0, 0.0)


def output(tokens: list[int], reason: str | None = None, **more: Any) -> Any:
    events = tuple(seam.TokenEvent(t, "accepted", -1.0, ((t, -1.0),)) for t in tokens)
    return seam.StepOutput(
        "r", events, (), reason, more.get("stop_reason"), STATS, stop_token=reason == "stop"
    )


def ids(text: str) -> list[int]:
    return list(SERVED.tokenizer(text, add_special_tokens=False)["input_ids"])


@settings(max_examples=100)
@given(
    cuts=st.lists(st.integers(1, 9), max_size=20),
    stop=st.sampled_from(["jumps", "dog. The", "zzz", "naï", "日"]),
)
def test_an_answer_is_the_same_however_its_tokens_are_grouped(cuts: list[int], stop: str) -> None:
    tokens, eos = SERVED.engine.script, SERVED.engine.eos
    whole = SERVED.tokenizer.decode(tokens)
    choice = Choice(SERVED.texts, SamplingParams(stop=(stop,)), 1)
    left, streamed = [*tokens, eos], ""
    for cut in [*cuts, len(left)]:
        now, left = left[:cut], left[cut:]
        delta = choice.add(output(now, None if left else "stop"))
        streamed += delta.text
        if choice.finish_reason or not left:
            break
    assert choice.text == streamed == whole.split(stop)[0]
    assert choice.stop_reason == (stop if stop in whole else None)
    if stop in whole:  # tokens beyond the stop string are not counted
        assert SERVED.tokenizer.decode([e.token_id for e in choice.events][:-1]).count(stop) == 0
    assert choice.add(output([5], "stop")).events == ()


def test_the_stop_token_is_counted_and_not_shown() -> None:
    token = ids("a")[0]
    for include, text in ((False, "b"), (True, "ba")):
        params = SamplingParams(include_stop_str_in_output=include, stop_token_ids=(token,))
        choice = Choice(SERVED.texts, params, 1)
        choice.add(output([*ids("b"), token], "stop", stop_reason=token))
        assert choice.text == text and len(choice.events) == 2 and choice.stop_reason == token


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    first = ids("日")[0]
    choice = Choice(SERVED.texts, SamplingParams(), 1)
    assert choice.add(output([first])).text == ""
    assert choice.add(output(ids("x")[:0], "length")).text == "\ufffd"


@settings(max_examples=100)
@given(cuts=st.lists(st.integers(1, 12), max_size=30))
def test_tool_calls_are_found_wherever_pieces_break(cuts: list[int]) -> None:
    text = f"Let me look. {CALL}\n{CALL} and <tool_call>not json</tool_call> <tool_cal"
    reader, found = AnswerStream(AnswerStyle()), AnswerDelta()
    for cut in [*cuts, len(text)]:
        piece, text = text[:cut], text[cut:]
        found += reader.add(piece)
    found += reader.finish()
    assert found.content == "Let me look. \n and <tool_call>not json</tool_call> <tool_cal"
    assert [c["function"]["name"] for c in found.tool_calls] == ["weather", "weather"]
    first, second = found.tool_calls
    assert json.loads(first["function"]["arguments"]) == {"city": "Köln"} and first["id"] != second["id"]


def test_a_tool_call_reaches_the_client_whole_and_streamed() -> None:
    choice = Choice(SERVED.texts, SamplingParams(), 1)
    reply = ChatReply(SERVED.texts, False, lambda: AnswerStream(AnswerStyle()))
    chunks = [reply.chunk(0, choice, choice.add(output([t]))) for t in ids(CALL)]
    chunks.append(reply.chunk(0, choice, choice.add(output([SERVED.engine.eos], "stop"))))
    shown = [c for c in chunks if c is not None]
    assert [c["delta"]["tool_calls"][0]["index"] for c in shown if c["delta"].get("tool_calls")] == [0]
    assert shown[-1]["finish_reason"] == "tool_calls"
    whole = reply.whole(0, choice, [], Echo())
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    assert whole["message"]["tool_calls"][0]["function"]["name"] == "weather"
    plain = ChatReply(SERVED.texts, False).whole(0, choice, [], Echo())
    assert plain["message"]["content"] == CALL and plain["finish_reason"] == "stop"


def test_usage_counts_each_prompt_once() -> None:
    choices = [Choice(SERVED.texts, SamplingParams(), 3) for _ in range(2)]
    for choice in choices:
        choice.add(output([5, 6], "length"))
    assert usage(choices, 3, 2)["total_tokens"] == 3 + 4


def test_cached_tokens_are_summed_over_prompts_as_their_first_answers_found_them() -> None:
    """Two prompts of ten tokens, two answers each: the second answer finds what the first has read."""
    choices = [Choice(SERVED.texts, SamplingParams(), 10) for _ in range(4)]
    for choice, cached in zip(choices, (4, 9, 6, 9), strict=True):
        choice.stats = seam.RequestStats(prompt_tokens=10, cached_tokens=cached)
    assert usage(choices, 20, 2)["prompt_tokens_details"] == {"cached_tokens": 4 + 6}


def test_logprobs_of_completions_line_up_with_the_text() -> None:
    choice = Choice(SERVED.texts, SamplingParams(logprobs=1), 1)
    pieces = list(choice.add(output(ids("naïve fox"), "length")).pieces)
    told = CompletionReply(SERVED.texts, False).whole(0, choice, pieces, Echo("echo"))["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"])
    assert told["text_offset"][0] == 4 and told["text_offset"][-1] <= 4 + len("naïve fox")


def test_body_fields_become_sampling_parameters() -> None:
    body = CompletionBody.model_validate(
        {
            "prompt": "a",
            "seed": 7,
            "top_k": -1,
            "logit_bias": {"5": 2.5},
            "stop": "x",
            "temperature": None,
            "draft": False,
        }
    )
    body.prompt_logprobs = 2
    of_all = from_body.sampling_params(body, SERVED, 3)
    assert [of_all.of_answer(i, 9).prompt_logprobs for i in range(3)] == [2, None, None], "scored once"
    params = of_all.of_answer(2, 9)
    assert (params.seed, params.top_k, params.logit_bias, params.stop) == (9, 0, {5: 2.5}, ("x",))
    assert (params.temperature, params.max_tokens, params.logprobs, params.draft) == (1.0, 9, 3, False)
    body.temperature = 1e-300
    assert from_body.sampling_params(body, SERVED, None).temperature == 0.01
    room = SERVED.engine.info.max_length - 2
    assert from_body.answer_length(body, SERVED, [1, 2], None) == room


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, tokenised = TokenTexts.encode, list[int]()

    def counted(self: TokenTexts, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        tokenised.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(TokenTexts, "encode", counted)
    text = "some words " * 250_000
    body = CompletionBody.model_validate({"prompt": text})
    with pytest.raises(ApiError, match="maximum context length is 512"):
        from_body.completion_prompts(body, SERVED)
    assert 0 < sum(tokenised) < len(text) / 20


def test_messages_become_what_templates_expect() -> None:
    body = ChatBody.model_validate(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
            ]
        }
    )
    text = SERVED.tokenizer.decode(from_body.chat_prompt(body.messages[:1], SERVED, most_tokens=99))
    assert "user\na\nb<|im_end|>" in text
    body.messages[1].tool_calls = [{"function": {"arguments": "{"}}]
    with pytest.raises(ApiError, match="not valid JSON"):
        from_body.chat_prompts(body, SERVED)


def test_a_validation_error_names_the_field_on_one_line() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"prompt": "a", "n": 0, "top_p": 7})
    error = from_validation(caught.value)
    assert error.param == "n" and error.status == 400 and "1 more" in str(error) and "\n" not in str(error)


def run_worker(load: Any, use: Any) -> Any:
    async def main() -> Any:
        worker = Worker(load, ServerMetrics(), 4)
        worker.start()
        while worker.state == "loading":
            await asyncio.sleep(0.01)
        try:
            return await asyncio.wait_for(use(worker), PATIENCE)
        finally:
            await asyncio.get_running_loop().run_in_executor(None, worker.stop)

    return asyncio.run(main())


def test_the_worker_aborts_what_is_cancelled_and_drains_the_rest(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    served = fake_served(hold=hold)
    engine: FakeEngine = served.engine
    params = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0)

    async def use(worker: Worker) -> None:
        hold.touch()
        kept = await worker.submit("kept", [([1], params)])
        left = await worker.submit("left", [([1], params), ([2], params)])
        assert worker.in_flight == 3
        worker.cancel(left)
        worker.drain()
        hold.unlink()
        with pytest.raises(ApiError, match="shutting down"):
            await worker.submit("new", [([1], params)])
        while worker.in_flight:
            await asyncio.sleep(0.02)
        assert sorted(engine.aborted) == sorted(left.ids) and not engine.requests
        outputs = [kept.items.get_nowait() for _ in range(kept.items.qsize())]
        assert sum(len(o.events) for _, o in outputs) == 200 and outputs[-1][1].finish_reason == "length"

    run_worker(lambda: served, use)


def test_the_event_loop_is_not_woken_for_each_step_of_a_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first and the last one, and for what was held for long enough; with a stop string, or for a
    stream, for each."""
    params = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0)
    counted: dict[str, int] = {}

    async def use(worker: Worker) -> None:
        dispatch = Worker._dispatch

        def count(self: Worker, held: Any) -> None:
            name = held[0][1][0].request_id.split("-")[0]
            counted[name] = counted.get(name, 0) + 1
            dispatch(self, held)

        monkeypatch.setattr(Worker, "_dispatch", count)
        for name, whole, asked, held in (
            ("whole", True, params, PATIENCE),
            ("long", True, params, 0.0),
            ("stream", False, params, PATIENCE),
            ("stop", True, replace(params, stop=("never",)), PATIENCE),
        ):
            monkeypatch.setattr(worker_module, "HELD", held)
            ticket = await worker.submit(name, [([1], asked)], whole)
            first = await ticket.items.get()
            assert not isinstance(first, ApiError) and first[1].finish_reason is None
            outputs = [first[1]]
            while outputs[-1].finish_reason is None:
                outputs.append((await ticket.items.get())[1])
            assert sum(len(o.events) for o in outputs) == 200

    run_worker(lambda: fake_served(0.0005), use)
    steps = 1 + -(-199 // 3)
    assert counted == {"whole": 2, "long": steps, "stream": steps, "stop": steps}


def test_a_model_that_does_not_load_is_reported() -> None:
    def load() -> Any:
        raise TargetError("no such model")

    async def use(worker: Worker) -> None:
        assert worker.state == "failed" and str(worker.failure) == "no such model"
        with pytest.raises(ApiError) as caught:
            worker.ready()
        assert caught.value.status == 503

    run_worker(load, use)


@pytest.mark.parametrize("wrong", [{"port": -1}, {"max_waiting": 0}, {"api_keys": ("",)}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ServeError):
        ServeSettings(**wrong)


def test_a_stream_that_never_began_is_closed_all_the_same() -> None:
    closed: list[int] = []

    async def events() -> Any:
        yield b"x"

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(1)

    with pytest.raises(ClientLeft):
        asyncio.run(EventStream(events(), lambda: closed.append(1))({"type": "http"}, receive, send))
    assert closed == [1]

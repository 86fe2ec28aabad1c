"""The whole server: `draftkit serve` with the embedded target, asked by the openai client."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.patience import PATIENCE, wait_until
from support.server import ASSET, SERVE, Server, serving

QUESTIONS = ("Solve for x: 3x + 4 = 19.", "Write a function that adds two numbers.", "What is 17 + 25?")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(command=SERVE) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """Greedy answers of plain Transformers."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32),
        AutoTokenizer.from_pretrained(ASSET),
    )
    answers = {}
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        with torch.inference_mode():
            out = model.generate(**text, max_new_tokens=48, do_sample=False)[0, text["input_ids"].shape[1] :]
        answers[question] = tokenizer.decode(out, skip_special_tokens=True)
    return answers


def ask(client: openai.OpenAI, question: str, **more: object) -> str:
    options = {"model": "", "max_tokens": 48, "temperature": 0, **more}
    options["model"] = client.models.list().data[0].id
    answer = client.chat.completions.create(messages=[{"role": "user", "content": question}], **options)  # type: ignore[call-overload]
    return str(answer.choices[0].message.content)


def test_greedy_answers_are_transformers_answers(client: openai.OpenAI, reference: dict[str, str]) -> None:
    assert {q: ask(client, q) for q in QUESTIONS} == reference


def test_together_and_streamed_they_are_the_same(
    server: Server, client: openai.OpenAI, reference: dict[str, str]
) -> None:
    texts: dict[int, str] = {}

    def one(number: int) -> None:
        question = QUESTIONS[number % 3]
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": question}],
            max_tokens=48,
            temperature=0,
            stream=True,
        )
        texts[number] = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: reference[QUESTIONS[i % 3]] for i in range(9)}


def test_a_seed_gives_the_same_sample_alone_and_beside_others(client: openai.OpenAI) -> None:
    alone = ask(client, QUESTIONS[0], temperature=1.0, seed=5)
    beside: list[str] = []
    threads = [
        threading.Thread(
            target=lambda i=i: beside.append(ask(client, QUESTIONS[0], temperature=1.0, seed=5 + i % 2 * i))
        )
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert beside.count(alone) >= 3


def test_stop_strings_logprobs_and_statistics(
    server: Server, client: openai.OpenAI, reference: dict[str, str]
) -> None:
    text = reference[QUESTIONS[0]]
    stop = text[8:12]
    assert ask(client, QUESTIONS[0], stop=[stop]) == text[: text.index(stop)]
    body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "max_tokens": 12}
    told = server.http.post(
        "/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2, "return_spec_stats": True}
    ).json()
    tokens = told["choices"][0]["logprobs"]["content"]
    assert len(tokens) == told["usage"]["completion_tokens"]
    assert all(t["logprob"] <= 0 and t["top_logprobs"][0]["logprob"] >= t["logprob"] - 1e-4 for t in tokens)
    assert "speculative_decoding" in told["metrics"]


def test_metrics_count_and_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    body = {"prompt": "one two three", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    server.wait_for_running(0)
    assert server.metric("generation_tokens_total") > 0


@pytest.mark.slow
def test_ready_means_that_passes_are_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serving(command=SERVE) as server:
        log = "".join(server.log)
        assert 0 < log.index("compiling step, once for this machine") < log.index("forward compiled")
        assert list(tmp_path.glob("draftkit/step-*.so"))
        assert server.metric("generation_tokens_total") == 0, "nobody has asked for anything"


@pytest.mark.slow
def test_without_a_compiler_the_server_says_so_and_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with serving(command=SERVE) as server:
        server.logged(r"no compiled passes: .* \(no C\+\+ compiler found")
        body = {"prompt": "one two three", "max_tokens": 4}
        assert server.http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] > 0


@pytest.mark.slow
def test_sigterm_under_load_finishes_and_ends_with_zero() -> None:
    with serving(command=SERVE) as server:
        body = {"prompt": "one two three", "max_tokens": 300, "ignore_eos": True}
        answers: list[httpx.Response] = []

        def one() -> None:
            answers.append(
                httpx.post(server.url + "/v1/completions", json=body, timeout=PATIENCE, trust_env=False)
            )

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        taken = ("num_requests_running", "num_requests_waiting", "request_success_total")
        wait_until(lambda: server.metric(*taken) == 4, "four that are taken")
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [a.json()["usage"]["completion_tokens"] for a in answers] == [300] * 4
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.slow
def test_after_a_sigkill_the_next_process_serves_the_same_port_with_the_same_answers(
    reference: dict[str, str],
) -> None:
    with serving(command=SERVE) as server:
        port = server.url.rsplit(":", 1)[1]
        body = {"prompt": "one two three", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
            server.process.send_signal(signal.SIGKILL)
            assert server.process.wait(PATIENCE) == -signal.SIGKILL
    with serving("--port", port, command=SERVE[:-2]) as again:
        client = openai.OpenAI(base_url=again.url + "/v1", api_key="any", max_retries=0)
        assert again.url.endswith(port) and ask(client, QUESTIONS[0]) == reference[QUESTIONS[0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "/nowhere"), "/nowhere: no such folder"),
        (("--drafter", "/nowhere"), "/nowhere: no such folder"),
        (("--plan", "clever"), "plan is 'clever'; choose one of planned, fixed"),
        (("--device", "warp"), "--device warp: is not known; give cpu, cuda or cuda:1"),
        (("--kv-gib", "0.001"), "--kv-gib of 0.001 GiB hold .* give [0-9.]+ GiB or a smaller --max-length"),
        (("--kv-gib", "nan"), "--kv-gib is nan"),
        (("--max-length", "999999"), "--max-length is 999999; tiny allows 2048 at most"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_code_2(options: tuple[str, ...], message: str) -> None:
    done = subprocess.run([*SERVE, *options], capture_output=True, text=True, check=False)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and re.search(message, line) and "Traceback" not in done.stderr

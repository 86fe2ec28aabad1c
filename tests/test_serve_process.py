"""The server process: clients that leave, keys, limits, signals, failures."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from test_serve_harness import CHAT, FAKE, TEXT, Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--step-seconds", "0.002") as running:
        yield running


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    endless = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "temperature": 0}
    began = server.metric("generation_tokens_total")
    with server.http.stream("POST", "/v1/completions", json={**endless, "stream": True}) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=endless, timeout=0.05, headers={"X-Request-Id": "leaver"})
    assert "client left" in server.logged("leaver ")
    time.sleep(0.15)
    made = server.metric("generation_tokens_total")
    time.sleep(0.15)
    assert server.metric("generation_tokens_total") == made and made - began < 500


def test_a_client_that_leaves_while_it_sends_is_no_error(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: half\r\nContent-Type: application/json\r\n"
        connection.sendall((head + 'Content-Length: 99\r\n\r\n{"prompt"').encode())
        time.sleep(0.1)
    assert "client left" in server.logged("half ")
    assert not [line for line in server.log if "Traceback" in line]


def streamed(text: str) -> str:
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


def test_many_at_once_and_many_that_leave(server: Server) -> None:
    wrong: list[str] = []

    def one(number: int) -> None:
        body = {**CHAT, "stream": number % 2 == 0}
        with httpx.Client(base_url=server.url, timeout=15, trust_env=False) as http:
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                if number % 3 == 0:
                    return
                response.read()
            said = streamed(response.text) if body["stream"] else response.json()["choices"][0]["message"]["content"]
            if response.status_code != 200 or said != TEXT:
                wrong.append(response.text)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert not wrong
    assert server.http.get("/health").status_code == 200


def test_api_keys_guard_v1_alone_and_a_full_queue_says_when_to_come_back() -> None:
    with serving("--api-key", "one", "--api-key", "two", "--max-waiting", "2", "--step-seconds", "0.4") as server:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.post("/v1/completions", json={}).json()["error"]["code"] == 401
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer one"}).status_code == 200
        assert {server.http.get(p).status_code for p in ("/health", "/metrics", "/", "/version")} == {200}
        http = openai.OpenAI(base_url=server.url + "/v1", api_key="two", max_retries=0)
        statuses: list[int] = []

        def one() -> None:
            raw = http.completions.with_raw_response
            try:
                statuses.append(raw.create(model="fake", prompt="x", max_tokens=1).status_code)
            except openai.RateLimitError as error:
                statuses.append(429 if error.response.headers["retry-after"] == "1" else 0)

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert 200 in statuses and 429 in statuses and len(statuses) == 6
        assert server.metric("admission_rejections_total") == statuses.count(429)


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones() -> None:
    with serving("--step-seconds", "0.02") as server:
        answers: list[httpx.Response] = []
        body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True, "temperature": 0}

        def one(stream: bool) -> None:
            answers.append(httpx.post(server.url + "/v1/completions", json={**body, "stream": stream}, timeout=15))

        threads = [threading.Thread(target=one, args=(i % 2 == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        refused = server.http.post("/v1/completions", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health").status_code == 200
        for thread in threads:
            thread.join(15)
        assert [a.status_code for a in answers] == [200] * 4
        assert all(a.text.endswith("data: [DONE]\n\n") or a.json()["usage"]["completion_tokens"] == 150 for a in answers)
        assert server.process.wait(10) == 0


def test_an_engine_that_breaks_answers_500_and_ends_the_process_with_an_error() -> None:
    with serving() as server:
        assert server.http.post("/v1/completions", json={"prompt": "x", "seed": 13}).status_code == 500
        assert server.process.wait(10) == 2
        assert "the engine stopped: RuntimeError" in server.logged("error: ")


def test_a_port_that_is_taken_is_one_clear_line(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    second = subprocess.run([sys.executable, str(FAKE), "--port", port], capture_output=True, text=True, timeout=20)
    assert second.returncode == 2
    assert "cannot listen on 127.0.0.1" in second.stderr and "Traceback" not in second.stderr


def test_a_huge_prompt_does_not_hold_up_the_others() -> None:
    with serving("--step-seconds", "0.005", "--max-body-bytes", "8000000") as server:
        gaps: list[float] = []

        def watch() -> None:
            body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=15, trust_env=False) as response:
                last = time.monotonic()
                for _ in response.iter_lines():
                    gaps.append(time.monotonic() - last)
                    last = time.monotonic()

        thread = threading.Thread(target=watch)
        thread.start()
        time.sleep(0.3)
        began = time.monotonic()
        assert server.http.post("/v1/completions", json={"prompt": "some words " * 250_000}).status_code == 400
        took = time.monotonic() - began
        thread.join(15)
        assert took > 0.3, "the prompt was meant to be slow to tokenise"
        assert max(gaps[1:]) < took / 2

"""The server process: clients that leave, keys, limits, signals, failures."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import httpx
import openai
import pytest

from support.server import CHAT, FAKE, TEXT, Server, serving


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
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: half\r\nContent-Type: "
            "application/json\r\n"
        )
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
            said = (
                streamed(response.text)
                if body["stream"]
                else response.json()["choices"][0]["message"]["content"]
            )
            if response.status_code != 200 or said != TEXT:
                wrong.append(response.text)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert not wrong
    assert server.http.get("/health").status_code == 200


def test_api_keys_guard_v1_and_a_full_queue_says_when_to_come_back() -> None:
    limits = ("--max-running", "1", "--max-waiting", "2", "--step-seconds", "0.4")
    with serving("--api-key", "one", "--api-key", "two", "--api-key", "schlüssel", *limits) as server:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.post("/v1/completions", json={}).json()["error"]["code"] == 401
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer one"}).status_code == 200
        assert (
            server.http.get("/v1/models", headers={"Authorization": "Bearer schlüssel".encode()}).status_code
            == 200
        )
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
        assert statuses.count(200) >= 3 and 429 in statuses and len(statuses) == 6
        assert server.metric("admission_rejections_total") == statuses.count(429)
        with (
            pytest.raises(openai.RateLimitError),
            http.completions.create(model="fake", prompt="x", stream=True),
        ):
            # beside one that runs there is room for two
            http.completions.create(model="fake", prompt="x", n=3)
        server.logged("client left")
        # an idle server takes any request
        many = http.completions.create(model="fake", prompt="x", n=5, max_tokens=1)
        assert len(many.choices) == 5


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones() -> None:
    with serving("--step-seconds", "0.02") as server:
        answers: list[httpx.Response] = []
        body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True, "temperature": 0}

        def one(stream: bool) -> None:
            answers.append(
                httpx.post(server.url + "/v1/completions", json={**body, "stream": stream}, timeout=15)
            )

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
        assert all(
            a.text.endswith("data: [DONE]\n\n") or a.json()["usage"]["completion_tokens"] == 150
            for a in answers
        )
        assert server.process.wait(10) == 0


def test_an_engine_that_breaks_answers_500_and_ends_the_process_with_an_error() -> None:
    with serving() as server:
        assert server.http.post("/v1/completions", json={"prompt": "x", "seed": 13}).status_code == 500
        assert server.process.wait(10) == 2
        assert "the engine stopped: RuntimeError" in server.logged("error: ")


def test_a_port_that_is_taken_is_one_clear_line(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    second = subprocess.run(
        [sys.executable, str(FAKE), "--port", port], capture_output=True, text=True, timeout=20
    )
    assert second.returncode == 2
    assert "cannot listen on 127.0.0.1" in second.stderr and "Traceback" not in second.stderr


def test_a_huge_prompt_does_not_hold_up_the_others() -> None:
    with serving("--step-seconds", "0.005", "--max-body-bytes", "8000000") as server:
        gaps: list[float] = []

        def watch() -> None:
            body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
            with httpx.stream(
                "POST", server.url + "/v1/completions", json=body, timeout=15, trust_env=False
            ) as response:
                last = time.monotonic()
                for _ in response.iter_lines():
                    gaps.append(time.monotonic() - last)
                    last = time.monotonic()

        thread = threading.Thread(target=watch)
        thread.start()
        time.sleep(0.3)
        began = time.monotonic()
        assert (
            server.http.post("/v1/completions", json={"prompt": "some words " * 250_000}).status_code == 400
        )
        took = time.monotonic() - began
        thread.join(15)
        assert took < 5, "a prompt that cannot fit is refused before it is tokenised whole"
        assert max(gaps[1:]) < 0.5


@pytest.mark.parametrize("signals", [1, 2])
def test_who_is_not_ready_when_the_time_is_over_is_told(signals: int) -> None:
    """By a second signal, or because the time to drain has passed."""
    with serving("--step-seconds", "0.02", "--drain-seconds", "0.5" if signals == 1 else "60") as server:
        body = {"prompt": "x", "max_tokens": 490, "ignore_eos": True, "temperature": 0}
        answers: dict[bool, httpx.Response] = {}

        def one(stream: bool) -> None:
            answers[stream] = httpx.post(
                server.url + "/v1/completions", json={**body, "stream": stream}, timeout=15
            )

        threads = [threading.Thread(target=one, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        while server.metric("generation_tokens_total") < 10:
            time.sleep(0.02)
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        for thread in threads:
            thread.join(15)
        assert server.process.wait(10) == 0
        assert answers[False].status_code == 503 and answers[False].headers["x-request-id"]
        assert answers[False].json()["error"]["code"] == 503
        *_, last, done = [line for line in answers[True].text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503 and done == "data: [DONE]"
        server.logged("ending with 2 unfinished")
        assert len([line for line in server.log if "200" in line and "cut off with 503" in line]) == 1
        assert not [line for line in server.log if "Traceback" in line or "before the model" in line]


def test_a_reader_who_stalls_does_not_hold_up_the_end() -> None:
    with serving("--drain-seconds", "1", "--text", "word " * 200) as server:
        host, port = server.url.removeprefix("http://").split(":")
        raw = json.dumps(
            {"prompt": "x", "n": 128, "max_tokens": 200, "stream": True, "return_token_origins": True}
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: stalled\r\nContent-Type: "
            "application/json\r\n"
        )
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
            server.logged("serving")
            while server.metric("generation_tokens_total") < 100 * 150:
                time.sleep(0.05)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0 and time.monotonic() - began < 5
        assert "cut off" in server.logged("stalled ")
        assert not [line for line in server.log if "Traceback" in line]


def serving_within(soft: int, hard: int) -> AbstractContextManager[Server]:
    """A server that may open so many files, and may raise that to `hard`."""
    code = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); sys.argv = sys.argv[1:]"
    start = f"import resource, runpy, sys; {code}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return serving(command=(sys.executable, "-c", start, str(FAKE)))


def test_idle_connections_cannot_use_up_the_files() -> None:
    """However few there are: the connection that has been idle for longest makes room."""
    with serving_within(80, 80) as server:
        host, port = server.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), 5) for _ in range(120)]
        with httpx.Client(base_url=server.url, timeout=15, trust_env=False) as http:
            assert http.get("/health").status_code == 200
        for connection in idle:
            connection.close()
        assert not [line for line in server.log if "Traceback" in line]
        assert len([line for line in server.log if "files" in line]) <= 1


def test_the_limit_of_files_is_raised_as_far_as_it_may_be() -> None:
    with serving_within(60, 300) as server:
        host, port = server.url.removeprefix("http://").split(":")
        many = [socket.create_connection((host, int(port)), 5) for _ in range(150)]
        with httpx.Client(base_url=server.url, timeout=15, trust_env=False) as http:
            assert http.get("/health").status_code == 200
        for connection in many:
            connection.close()


def test_the_log_says_what_was_wrong_with_a_request(server: Server) -> None:
    server.http.post(
        "/v1/completions", json={"prompt": "a", "top_p": 2}, headers={"X-Request-Id": "wrong-one"}
    )
    assert re.search(r"wrong-one POST /v1/completions 400 .*top_p", server.logged("wrong-one "))


def test_a_body_of_millions_of_mistakes_holds_nobody_up(server: Server) -> None:
    """Each within the limit of the body, and each found by its first mistake."""
    size = 2**20 - 100
    fields = {
        "prompt": "-1",
        "stop_token_ids": "-1",
        "stop": '""',
        "tools": "{}",
        "messages": "{}",
        "allowed_token_ids": '"x"',
    }
    for name, entry in fields.items():
        body = f'{{"{name}": [{",".join([entry] * (size // (len(entry) + 1)))}]}}'
        path = "/v1/chat/completions" if name in ("tools", "messages") else "/v1/completions"
        answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.elapsed.total_seconds() < 1.5, name

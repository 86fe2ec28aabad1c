"""The server process: clients that leave, keys, limits, signals, failures."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.patience import PATIENCE, wait_until
from support.server import CHAT, FAKE, TEXT, Server, serving

LONG = ("--max-length", "1000000000")
ENDLESS = {"prompt": "x", "max_tokens": 900_000_000, "ignore_eos": True, "temperature": 0}
# whoever is told something before the process ends gets the time to take it
UNHURRIED = tuple(
    word
    for name in ("_FLUSH_SECONDS", "_CUT_SECONDS")
    for word in ("--constant", f"draftkit.serve.server.{name}={PATIENCE}")
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--step-seconds", "0.002", *LONG) as running:
        yield running


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    """One that reads a stream, and one that waits for a whole answer; neither would ever end."""
    with server.http.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as response:
        next(response.iter_lines())
    server.wait_for_running(0)
    with server.ask("/v1/completions", ENDLESS, "leaver"):
        server.wait_for_running(1)
    assert "client left" in server.logged("leaver ")
    server.wait_for_running(0)


def test_a_client_that_leaves_while_it_sends_is_no_error(server: Server) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: half\r\nContent-Type: application/json"
    server.connect((head + '\r\nContent-Length: 99\r\n\r\n{"prompt"').encode()).close()
    assert "client left" in server.logged("half ")
    assert not [line for line in server.log if "Traceback" in line]


def test_a_stop_string_ends_the_work_of_the_engine(server: Server) -> None:
    answer = server.http.post("/v1/completions", json={**ENDLESS, "stop": ["quick"]}).json()
    assert answer["choices"][0]["text"] == "The "
    server.wait_for_running(0)


def test_an_answer_that_nobody_waits_for_is_counted_as_aborted(server: Server) -> None:
    def counts() -> list[float]:
        found = text_string_to_metric_families(server.http.get("/metrics").text)
        names = ("request_success_total", "prompt_tokens_total")
        samples = [s for f in found for s in f.samples if s.labels.get("finished_reason", "abort") == "abort"]
        return [sum(s.value for s in samples if s.name == f"draftkit:{name}") for name in names]

    before, whole = counts(), server.metric("e2e_request_latency_seconds_count")
    for stream in (False, True):  # two choices each, which have begun
        made = server.metric("generation_tokens_total")
        with server.ask("/v1/completions", ENDLESS | {"prompt": [5, 6, 7], "stream": stream, "n": 2}):
            wait_until(lambda made=made: server.metric("generation_tokens_total") > made + 2)
        server.wait_for_running(0)
    wanted = [before[0] + 4, before[1] + 4 * 3]
    wait_until(lambda: counts() == wanted, f"{wanted}")
    assert server.metric("e2e_request_latency_seconds_count") == whole


def streamed(text: str) -> str:
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


def test_many_at_once_and_many_that_leave(server: Server) -> None:
    right: list[int] = []

    def one(number: int) -> None:
        body = {**CHAT, "stream": number % 2 == 0}
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                if number % 3 == 0:
                    return
                response.read()
            said = (
                streamed(response.text)
                if body["stream"]
                else response.json()["choices"][0]["message"]["content"]
            )
            right.append(response.status_code == 200 and said == TEXT)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 16
    assert server.http.get("/health").status_code == 200


def test_api_keys_guard_v1() -> None:
    with serving("--api-key", "one", "--api-key", "two", "--api-key", "schlüssel") as server:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.post("/v1/completions", json={}).json()["error"]["code"] == 401
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        for key in ("one", "two", "schlüssel"):
            headers = {b"Authorization": f"Bearer {key}".encode()}
            assert server.http.get("/v1/models", headers=headers).status_code == 200
        assert {server.http.get(p).status_code for p in ("/health", "/metrics", "/", "/version")} == {200}


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    """One runs and two wait while the engine stands still; the other three of six are sent away."""
    hold = tmp_path / "hold"
    hold.touch()
    with serving("--max-running", "1", "--max-waiting", "2", "--hold", str(hold), *LONG) as server:
        http = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0, timeout=PATIENCE)
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
        wait_until(lambda: len(statuses) == 3, "three that are sent away")
        hold.unlink()
        for thread in threads:
            thread.join()
        assert statuses == [429] * 3 + [200] * 3
        assert server.metric("admission_rejections_total") == 3
        with server.ask("/v1/completions", ENDLESS):
            server.wait_for_running(1)
            with pytest.raises(openai.RateLimitError):  # beside one that runs there is room for two
                http.completions.create(model="fake", prompt="x", n=3)
        server.wait_for_running(0)
        # an idle server takes any request
        many = http.completions.create(model="fake", prompt="x", n=5, max_tokens=1)
        assert len(many.choices) == 5


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    """The engine stands still until the signal has been taken."""
    hold = tmp_path / "hold"
    hold.touch()
    with serving("--hold", str(hold), "--drain-seconds", "1e6", *UNHURRIED) as server:
        answers: list[httpx.Response] = []
        body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True, "temperature": 0}

        def one(stream: bool) -> None:
            asked = {**body, "stream": stream}
            answers.append(httpx.post(server.url + "/v1/completions", json=asked, timeout=PATIENCE))

        threads = [threading.Thread(target=one, args=(i % 2 == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        server.wait_for_running(4)
        server.process.send_signal(signal.SIGTERM)
        server.logged("shutting down: 4 answers")
        refused = server.http.post("/v1/completions", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health").status_code == 200
        hold.unlink()
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [200] * 4
        assert all(
            a.text.endswith("data: [DONE]\n\n") or a.json()["usage"]["completion_tokens"] == 150
            for a in answers
        )
        assert server.process.wait(PATIENCE) == 0


def test_an_engine_that_breaks_answers_500_and_ends_the_process_with_an_error() -> None:
    with serving(*UNHURRIED) as server:
        assert server.http.post("/v1/completions", json={"prompt": "x", "seed": 13}).status_code == 500
        assert server.process.wait(PATIENCE) == 2
        assert "the engine stopped: RuntimeError" in server.logged("error: ")


def test_a_port_that_is_taken_is_one_clear_line(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    second = subprocess.run([sys.executable, str(FAKE), "--port", port], capture_output=True, text=True)
    assert second.returncode == 2
    assert "cannot listen on 127.0.0.1" in second.stderr and "Traceback" not in second.stderr


@pytest.mark.parametrize("signals", [1, 2])
def test_who_is_not_ready_when_the_time_is_over_is_told(signals: int) -> None:
    """By a second signal, or because the time to drain has passed."""
    drain = ("--drain-seconds", "0.5" if signals == 1 else "1e6")
    with serving("--step-seconds", "0.002", *LONG, *drain, *UNHURRIED) as server:
        answers: dict[bool, httpx.Response] = {}

        def one(stream: bool) -> None:
            asked = {**ENDLESS, "stream": stream}
            answers[stream] = httpx.post(server.url + "/v1/completions", json=asked, timeout=PATIENCE)

        threads = [threading.Thread(target=one, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        server.wait_for_running(2)
        server.process.send_signal(signal.SIGTERM)
        server.logged("shutting down")
        if signals == 2:
            server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(PATIENCE) == 0
        assert answers[False].status_code == 503 and answers[False].headers["x-request-id"]
        assert answers[False].json()["error"]["code"] == 503
        *_, last, done = [line for line in answers[True].text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503 and done == "data: [DONE]"
        server.logged("ending with 2 unfinished")
        assert len([line for line in server.log if "200" in line and "cut off with 503" in line]) == 1
        assert not [line for line in server.log if "Traceback" in line or "before the model" in line]


def test_a_reader_who_stalls_does_not_hold_up_the_end() -> None:
    """It would for ever: a stalled client is never given up here."""
    patient = ("--constant", "draftkit.serve.stream.STALLED_SECONDS=1e6")
    with serving("--drain-seconds", "1", "--text", "word " * 200, *patient) as server:
        body = {"prompt": "x", "n": 128, "max_tokens": 200, "stream": True, "return_token_origins": True}
        with server.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw = json.dumps(body).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: stalled\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            wait_until(lambda: server.metric("generation_tokens_total") > 100 * 150)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(PATIENCE) == 0
        assert "cut off" in server.logged("stalled ")
        assert not [line for line in server.log if "Traceback" in line]


def serving_within(soft: int, hard: int) -> AbstractContextManager[Server]:
    """A server that may open so many files, and may raise that to `hard`."""
    code = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); sys.argv = sys.argv[1:]"
    start = f"import resource, runpy, sys; {code}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return serving(command=(sys.executable, "-c", start, str(FAKE)))


@pytest.mark.slow
def test_idle_connections_cannot_use_up_the_files() -> None:
    """However few there are: the connection that has been idle for longest makes room."""
    with serving_within(80, 80) as server:
        idle = [server.connect() for _ in range(120)]
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            assert http.get("/health").status_code == 200
        for connection in idle:
            connection.close()
        assert not [line for line in server.log if "Traceback" in line]
        assert len([line for line in server.log if "files" in line]) <= 1


@pytest.mark.slow
def test_the_limit_of_files_is_raised_as_far_as_it_may_be() -> None:
    with serving_within(60, 300) as server:
        many = [server.connect() for _ in range(150)]
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            assert http.get("/health").status_code == 200
        for connection in many:
            connection.close()


def test_the_log_says_what_was_wrong_with_a_request(server: Server) -> None:
    server.http.post(
        "/v1/completions", json={"prompt": "a", "top_p": 2}, headers={"X-Request-Id": "wrong-one"}
    )
    assert re.search(r"wrong-one POST /v1/completions 400 .*top_p", server.logged("wrong-one "))


def test_a_body_of_millions_of_mistakes_is_refused_for_the_first_ones(server: Server) -> None:
    """Each within the limit of the body: the mistakes that were found are counted in the answer."""
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
        assert answer.status_code == 400, name
        message = answer.json()["error"]["message"]
        found = re.search(r"\(and (\d+) more\)", message)
        assert found is None or int(found.group(1)) < 10, message

"""The load generator: its arithmetic, its load, and its numbers against servers whose speed is known."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftkit.errors import ServeError
from draftkit.output import as_json
from draftkit.serve.bench import ratios, read_prompts, run_bench, summarise
from draftkit.serve.load import Endpoint, Record, run_load
from draftkit.serve.settings import LoadSettings
from support.patience import PATIENCE
from support.server import Server, serving

SETTINGS = LoadSettings(prompts=("one", "two", "three"), requests=6, warmup=1, max_tokens=31)


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    with serving("--step-seconds", "0.02") as running:
        yield running


@pytest.fixture(scope="module")
def fast() -> Iterator[Server]:
    with serving("--step-seconds", "0.005") as running:
        yield running


def test_a_summary_counts_good_requests_only_and_gives_each_token_its_share() -> None:
    good = Record(sent=10.0, first=10.5, done=12.5, prompt_tokens=3, output_tokens=5, gaps=[0.5] * 4)
    bad = Record(sent=10.0, error="503: full")
    told = summarise(
        [good, bad],
        4.0,
        {"spec_decode_num_drafts_total": 10.0, "spec_decode_num_accepted_tokens_total": 25.0},
    )
    assert (told["requests"], told["failed"], told["first_error"]) == (2, 1, "503: full")
    assert told["tokens_per_s"] == 5 / 4 and told["tokens_per_s_per_user"] == 2
    assert told["ttft"]["p50"] == 0.5 and told["inter_token"]["mean"] == 0.5 and told["e2e"]["p99"] == 2.5
    assert told["accepted_len"] == 3.5 and told["accepted_len_source"] == "metrics"
    nothing = summarise([bad], 4.0, {})
    assert nothing["tokens_per_s_per_user"] is None and set(nothing["ttft"].values()) == {None}
    half = {**told, "tokens_per_s": told["tokens_per_s"] / 2, "ttft": {"p50": 1.0}}
    assert ratios([told, half])["tokens_per_s"] == 2 and ratios([told, half])["ttft_p50"] == 2


def test_closed_loop_measures_what_the_server_does(slow: Server, fast: Server, tmp_path: Path) -> None:
    """The stand-in makes 1 token in its first step and 3 in each of the next ten; every step sleeps, and may
    take longer."""
    results = run_bench([fast.url, slow.url + "/v1"], [1, 4], SETTINGS, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text("utf-8")) == json.loads(json.dumps(results))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    for run in results["runs"]:
        first, second = run["servers"]
        for server, step in ((first, 0.005), (second, 0.02)):
            assert server["failed"] == 0 and server["output_tokens"] == 31 * server["requests"]
            assert server["accepted_len"] == 3.0 and server["accepted_len_source"] == "responses"
            assert server["e2e"]["p50"] >= 11 * step and server["inter_token"]["mean"] > 0
            assert 0 < server["tokens_per_s"] <= run["concurrency"] * 31 / (11 * step)
        assert run["ratios"]["tokens_per_s"] == pytest.approx(first["tokens_per_s"] / second["tokens_per_s"])


def test_the_closed_loop_keeps_so_many_in_flight_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers when four have come."""
    ask, now, seen = Endpoint.ask, itertools.count(), list[int]()
    running: set[int] = set()

    async def counted(self: Endpoint, prompt: str) -> Record:
        number = next(now)
        running.add(number)
        seen.append(len(running))
        record = await ask(self, prompt)
        running.discard(number)
        return record

    monkeypatch.setattr(Endpoint, "ask", counted)
    with plain_server(lives=1, together=4) as url:
        settings = LoadSettings(prompts=("one",), requests=8, warmup=0, max_tokens=2)
        [run] = run_bench([url], [4], settings)["runs"]
    assert run["servers"][0]["failed"] == 0 and len(seen) == 8 and max(seen) == 4


def test_poisson_arrivals_follow_the_seed_and_rate(fast: Server) -> None:
    async def run(seed: int) -> list[Record]:
        settings = LoadSettings(
            ("a",), requests=12, warmup=0, concurrency=64, rate=20.0, max_tokens=4, seed=seed
        )
        endpoint = Endpoint(fast.url, None, settings)
        await endpoint.prepare()
        records, _, _ = await run_load(endpoint, settings)
        await endpoint.close()
        return records

    def gaps(records: list[Record]) -> Any:
        return np.diff(sorted(r.sent for r in records))

    first, again, other = (gaps(asyncio.run(run(seed))) for seed in (1, 1, 2))
    np.testing.assert_allclose(first, again, atol=1e-6)
    assert not np.allclose(first, other, atol=1e-3)
    order = random.Random(1)
    [order.choice(("a",)) for _ in range(12)]
    np.testing.assert_allclose(first, [order.expovariate(20.0) for _ in range(12)][1:], atol=1e-6)


def test_accepted_length_comes_from_metrics_where_answers_do_not_tell(fast: Server) -> None:
    async def run() -> dict[str, Any]:
        settings = LoadSettings(
            ("a",), requests=4, warmup=2, max_tokens=31, extra={"return_spec_stats": False}
        )
        endpoint = Endpoint(fast.url, None, settings)
        await endpoint.prepare()
        told = summarise(*await run_load(endpoint, settings))
        await endpoint.close()
        return told

    told = asyncio.run(run())
    assert told["accepted_len"] == 3.0 and told["accepted_len_source"] == "metrics"


@contextmanager
def plain_server(lives: int, cut_off: Container[int] = (), together: int = 1) -> Iterator[str]:
    """A server without usage that is found `lives` times, then no more. It ends the answers of the numbers in
    `cut_off`, from 1 on, too early, and answers when `together` requests have come."""
    left = iter(range(lives))
    numbers, meeting = itertools.count(1), threading.Barrier(together, timeout=PATIENCE)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.endswith("/models") and next(left, None) is not None
            self.answer(200 if known else 404, b'{"data": [{"id": "plain"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            meeting.wait()
            end = b"" if next(numbers) in cut_off else b"data: [DONE]\n\n"
            self.answer(200, b'data: {"choices": [{"delta": {"content": "a b"}}]}\n\n' * 2 + end)

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "draftkit.cli", "bench", "--requests", "2", "--warmup", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was said, but for the progress that a run tells of which takes longer than two seconds."""
    return [line for line in done.stderr.splitlines() if not re.match(r".* \d+ users \d+/\d+, ", line)]


def test_what_was_measured_stays_when_the_server_goes(tmp_path: Path) -> None:
    with plain_server(lives=1) as url:
        done = bench("--url", url, "--concurrency", "1", "--concurrency", "2", "--out", str(tmp_path))
    [error] = errors(done)
    assert done.returncode == 2 and "does not answer" in error
    assert f"no usage from {url}: chunks are counted as tokens" in done.stdout and "TTFT" in done.stdout
    [run] = json.loads((tmp_path / "bench.json").read_text("utf-8"))["runs"]
    assert (
        run["concurrency"],
        run["servers"][0]["output_tokens"],
        run["servers"][0]["tokens_counted_by"],
    ) == (1, 4, "chunks")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]


def test_results_are_written_after_each_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two servers is gone: the first one's numbers of that level stay too, and JSON shows
    them."""
    with plain_server(lives=2) as url, plain_server(lives=1) as other:
        shown: list[dict[str, Any]] = []
        with pytest.raises(ServeError, match="does not answer"):
            run_bench([url, other], [1, 2], SETTINGS, tmp_path, show=shown.append)
    runs = json.loads((tmp_path / "bench.json").read_text("utf-8"))["runs"]
    assert [len(run["servers"]) for run in runs] == [2, 1] and ["ratios" in run for run in runs] == [
        True,
        False,
    ]
    assert [json.loads(json.dumps(one["runs"])) for one in shown] == [runs]

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    before = (tmp_path / "bench.json").read_bytes()
    with plain_server(lives=1) as url, pytest.raises(OSError, match="No space"):
        run_bench([url], [1], SETTINGS, tmp_path)
    assert (tmp_path / "bench.json").read_bytes() == before  # never half a file


def test_an_out_that_is_a_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, told in (("file", "is a file; give the name of a folder"), ("file/below", "must be a folder")):
        done = bench("--url", "http://127.0.0.1:9", "--out", str(tmp_path / out))
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_json_has_no_numbers_that_json_lacks() -> None:
    for rate in ("nan", "inf", "-inf", "0"):
        done = bench("--url", "http://127.0.0.1:9", "--rate", rate)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "rate is" in done.stderr
    odd = {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": (float("-inf"), 2, "NaN")}
    assert json.loads(as_json(odd)) == {"a": [None, 1.5], "b": {"c": None}, "d": [None, 2, "NaN"]}
    with plain_server(lives=1) as url:
        done = bench("--url", url, "--json")
    assert done.returncode == 0
    settings = json.loads(done.stdout, parse_constant=pytest.fail)["settings"]
    assert settings["rate"] is None and "concurrency" not in settings, "which is each run's own"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--temperature", "nan"), "--temperature is nan;"),
        (("--temperature", "inf"), "--temperature is inf;"),
        (("--temperature", "-1"), "--temperature is -1;"),
        (("--warmup", "-1"), "--warmup is -1;"),
        (("--max-tokens", "0"), "--max-tokens is 0;"),
        (("--rate", "0"), "--rate is 0;"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_one_line_before_a_server_is_asked(
    option: tuple[str, str], message: str
) -> None:
    done = bench("--url", "http://127.0.0.1:9", *option)
    assert (
        done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    )


def test_a_request_that_failed_is_told_below_the_table_and_by_the_exit_code(tmp_path: Path) -> None:
    """The server cuts one answer of three off: the numbers of the others are there, and a script can tell."""
    with plain_server(lives=1, cut_off={2}) as url:
        done = bench("--url", url, "--requests", "3", "--out", str(tmp_path))
    assert done.returncode == 2 and "TTFT" in done.stdout
    assert errors(done) == [
        f"error: {url} at concurrency 1: 1 of 3 requests failed; the first one with the stream ended early"
    ]
    [run] = json.loads((tmp_path / "bench.json").read_text("utf-8"))["runs"]
    assert run["servers"][0]["failed"] == 1 and run["servers"][0]["output_tokens"] == 4


def test_with_a_rate_the_server_alone_limits_what_is_in_flight() -> None:
    """Five arrivals within milliseconds, to a server that answers when all five have come; no sixth is made
    of them."""
    with plain_server(lives=1, together=5) as url:
        done = bench("--url", url, "--rate", "1000", "--requests", "5", "--json")
    assert done.returncode == 0, done.stderr
    [run] = json.loads(done.stdout)["runs"]
    assert (run["concurrency"], run["servers"][0]["requests"], run["servers"][0]["failed"]) == (256, 5, 0)


def test_who_counted_the_tokens_is_told() -> None:
    def counted(*told: bool) -> Any:
        records = [
            Record(sent=0.0, first=0.5, done=1.0, output_tokens=2, gaps=[0.5], usage_told=one) for one in told
        ]
        return summarise(records, 1.0, {})["tokens_counted_by"]

    assert [counted(True, True), counted(True, False), counted()] == ["usage", "chunks", None]


def test_mistakes_are_one_line(fast: Server, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="does not answer"):
        run_bench(["http://127.0.0.1:9"], [1], SETTINGS)
    with pytest.raises(ServeError, match="one, or two"):
        run_bench(["a", "b", "c"], [1], SETTINGS)
    with pytest.raises(ServeError, match="no prompts"):
        LoadSettings(())
    with pytest.raises(ServeError, match=r"every request failed; the first one with 400: .*too large"):
        run_bench([fast.url], [1], LoadSettings(("a",), requests=2, warmup=0, max_tokens=10**6))
    for wrong in (
        "http://127.0.0.1:99999",
        "http://[::",
        "http://xn--a.com",
        "127.0.0.1:8000",
        "ftp://x",
        "http://",
    ):
        with pytest.raises(ServeError, match=f"^--url '{re.escape(wrong)}' is no address of a server"):
            run_bench([wrong], [1], SETTINGS)
    for key in ("schl\u00fcssel", "two\nlines"):
        with pytest.raises(ServeError, match=r"^--api-key for .* has characters"):
            run_bench(["http://127.0.0.1:9"], [1], SETTINGS, api_keys=[key])
    for raw in (b'{"no": 1}\n', b"[" * 10**5, bytes(range(256)) * 1000):
        (tmp_path / "bad.jsonl").write_bytes(raw)
        with pytest.raises(ServeError, match="needs JSONL rows") as error:
            read_prompts(tmp_path / "bad.jsonl")
        assert len(str(error.value)) < 300
    parts = '{"messages": [{"role": "user", "content": [1]}]}'
    for row in ("5", '{"prompt": 5}', '{"turns": [["a"]]}', '{"messages": "ab"}', parts):
        (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "good"}}\n\n{row}\n')
        with pytest.raises(ServeError, match=r"bad.jsonl, line 3: needs JSONL rows"):
            read_prompts(tmp_path / "bad.jsonl")
    rows = '{"turns": ["a\u2028b\u0085c", "b"]}\r\n\r\n{"messages": [{"role": "user", "content": "c"}]}\n'
    (tmp_path / "good.jsonl").write_bytes(rows.encode())
    assert read_prompts(tmp_path / "good.jsonl") == ("a\u2028b\u0085c", "c")

"""The load generator: its arithmetic, its load, and its numbers against servers whose speed is known."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from test_serve_harness import Server, serving

from draftkit.errors import ServeError
from draftkit.serve.bench import percentile, ratios, read_prompts, run_bench, summarise
from draftkit.serve.load import Endpoint, LoadSettings, Record, run_load

SETTINGS = LoadSettings(prompts=("one", "two", "three"), requests=6, warmup=1, max_tokens=31)


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    with serving("--step-seconds", "0.02") as running:
        yield running


@pytest.fixture(scope="module")
def fast() -> Iterator[Server]:
    with serving("--step-seconds", "0.005") as running:
        yield running


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = [random.Random(count).random() for _ in range(count)]
    for percent in (0, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([], 50) is None


def test_a_summary_counts_good_requests_only_and_gives_each_token_its_share() -> None:
    good = Record(sent=10.0, first=10.5, done=12.5, prompt_tokens=3, output_tokens=5, gaps=[0.5] * 4)
    bad = Record(sent=10.0, error="503: full")
    told = summarise([good, bad], 4.0, {"spec_decode_num_drafts_total": 10.0, "spec_decode_num_accepted_tokens_total": 25.0})
    assert (told["requests"], told["failed"], told["first_error"]) == (2, 1, "503: full")
    assert told["tokens_per_s"] == 5 / 4 and told["tokens_per_s_per_user"] == 2
    assert told["ttft"]["p50"] == 0.5 and told["inter_token"]["mean"] == 0.5 and told["e2e"]["p99"] == 2.5
    assert told["accepted_len"] == 3.5 and told["accepted_len_source"] == "metrics"
    half = {**told, "tokens_per_s": told["tokens_per_s"] / 2, "ttft": {"p50": 1.0}}
    assert ratios([told, half])["tokens_per_s"] == 2 and ratios([told, half])["ttft_p50"] == 2


def test_chunks_of_several_tokens_count_as_tokens_with_or_without_running_usage() -> None:
    def stream(running: bool) -> httpx.Response:
        lines = [{"choices": [{"delta": {"content": "ab"}}], "usage": {"completion_tokens": 2 * i}} for i in range(1, 4)]
        if not running:
            for line in lines:
                del line["usage"]
        lines.append({"choices": [], "usage": {"completion_tokens": 6, "prompt_tokens": 4}})
        return httpx.Response(200, text="".join(f"data: {json.dumps(line)}\n\n" for line in lines))

    async def ask(running: bool) -> Record:
        endpoint = Endpoint("http://x/v1/", None, SETTINGS)
        endpoint._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: stream(running)))
        return await endpoint.ask("hello")

    told, guessed = asyncio.run(ask(True)), asyncio.run(ask(False))
    assert (told.output_tokens, len(told.gaps), told.prompt_tokens) == (6, 4, 4)
    assert (guessed.output_tokens, len(guessed.gaps), guessed.chunks) == (6, 5, 3)


def test_closed_loop_measures_what_the_server_does(slow: Server, fast: Server, tmp_path: Path) -> None:
    """The stand-in makes 1 token in its first step and 3 in each of the next ten; every step sleeps."""
    results = run_bench([fast.url, slow.url + "/v1"], [1, 4], SETTINGS, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text("utf-8")) == json.loads(json.dumps(results))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    for run in results["runs"]:
        first, second = run["servers"]
        for server in run["servers"]:
            assert server["failed"] == 0 and server["output_tokens"] == 31 * server["requests"]
            assert server["accepted_len"] == 3.0 and server["accepted_len_source"] == "responses"
        assert second["e2e"]["p50"] >= 0.22 and second["inter_token"]["mean"] >= 0.02 / 3
        assert run["ratios"]["tokens_per_s"] == pytest.approx(first["tokens_per_s"] / second["tokens_per_s"])
        assert run["ratios"]["tokens_per_s"] > 1.2
    one, four = (run["servers"][1]["tokens_per_s"] for run in results["runs"])
    assert four > 1.7 * one


def test_poisson_arrivals_follow_the_seed_and_rate(fast: Server) -> None:
    async def run(seed: int) -> list[Record]:
        settings = LoadSettings(("a",), requests=12, warmup=0, concurrency=64, rate=20.0, max_tokens=4, seed=seed)
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
        settings = LoadSettings(("a",), requests=4, warmup=2, max_tokens=31, extra={"return_spec_stats": False})
        endpoint = Endpoint(fast.url, None, settings)
        await endpoint.prepare()
        told = summarise(*await run_load(endpoint, settings))
        await endpoint.close()
        return told

    told = asyncio.run(run())
    assert told["accepted_len"] == 3.0 and told["accepted_len_source"] == "metrics"


def test_mistakes_are_one_line(fast: Server, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="does not answer"):
        run_bench(["http://127.0.0.1:9"], [1], SETTINGS)
    with pytest.raises(ServeError, match="one, or two"):
        run_bench(["a", "b", "c"], [1], SETTINGS)
    with pytest.raises(ServeError, match="no prompts"):
        LoadSettings(())
    with pytest.raises(ServeError, match=r"every request failed; the first one with 400: .*too large"):
        run_bench([fast.url], [1], LoadSettings(("a",), requests=2, warmup=0, max_tokens=10**6))
    (tmp_path / "bad.jsonl").write_text('{"no": 1}\n')
    with pytest.raises(ServeError, match="needs JSONL rows"):
        read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "good.jsonl").write_text('{"turns": ["a", "b"]}\n\n{"messages": [{"role": "user", "content": "c"}]}\n')
    assert read_prompts(tmp_path / "good.jsonl") == ("a", "c")

"""`draftkit bench`: speed of OpenAI-compatible servers under load, one alone or two in one run with
ratios."""

from __future__ import annotations

import asyncio
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from draftkit import __version__
from draftkit.errors import ServeError, reason
from draftkit.output import as_json, make_folder, save_figure, write_text
from draftkit.serve.load import Endpoint, Record, run_load
from draftkit.serve.problem import shorten
from draftkit.serve.settings import LoadSettings

PERCENTILES = (50, 90, 99)


def summarise(records: Sequence[Record], seconds: float, counters: dict[str, float]) -> dict[str, Any]:
    """Numbers of one run. Latencies in seconds; `tokens_per_s` overall, `tokens_per_s_per_user` is the median
    over requests of output tokens / e2e time; accepted length counts the bonus token, 1 + accepted / rounds.
    `tokens_counted_by` is "chunks" where the server left out the usage of an answer: a chunk may hold several
    tokens.
    """
    good = [r for r in records if r.error is None and r.first is not None and r.done is not None]
    first = [r.first - r.sent for r in good if r.first is not None]
    whole = [r.done - r.sent for r in good if r.done is not None]
    gaps = [gap for r in good for gap in r.gaps]
    tokens = sum(r.output_tokens for r in good)

    def spread(values: Sequence[float]) -> dict[str, float | None]:
        if not values:
            return dict.fromkeys(["mean", *(f"p{p}" for p in PERCENTILES)])
        return {
            "mean": float(np.mean(values)),
            **{f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES},
        }

    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "first_error": next((r.error for r in records if r.error), None),
        "seconds": seconds,
        "output_tokens": tokens,
        "tokens_counted_by": ("usage" if all(r.usage_told for r in good) else "chunks") if good else None,
        "prompt_tokens": sum(r.prompt_tokens for r in good),
        "requests_per_s": len(good) / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_per_user": median([r.output_tokens / w for r, w in zip(good, whole, strict=True)])
        if good
        else None,
        "ttft": spread(first),
        "inter_token": spread(gaps),
        "e2e": spread(whole),
        **_speculation(good, counters),
    }


def _speculation(good: Sequence[Record], counters: dict[str, float]) -> dict[str, Any]:
    """Accepted length from the answers' own statistics (ours, vLLM's), else from the growth of /metrics
    counters."""
    told = [r.speculation for r in good if r.speculation]
    source: str | None = None
    rounds = drafted = accepted = 0.0
    if told:
        source = "responses"
        rounds = sum(s.get("num_spec_steps") or 0 for s in told)
        drafted = sum(s.get("num_draft_tokens") or 0 for s in told)
        accepted = sum(s.get("num_accepted_draft_tokens") or 0 for s in told)
    elif counters.get("spec_decode_num_drafts_total"):
        source = "metrics"
        rounds = counters["spec_decode_num_drafts_total"]
        drafted = counters.get("spec_decode_num_draft_tokens_total", 0.0)
        accepted = counters.get("spec_decode_num_accepted_tokens_total", 0.0)
    return {
        "accepted_len": 1 + accepted / rounds if rounds else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "accepted_len_source": source if rounds else None,
    }


def ratios(results: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """First server over second: above 1 the first is better (latencies are turned round)."""
    one, two = results[0], results[1]

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    return {
        "tokens_per_s": over(one["tokens_per_s"], two["tokens_per_s"]),
        "tokens_per_s_per_user": over(one["tokens_per_s_per_user"], two["tokens_per_s_per_user"]),
        "ttft_p50": over(two["ttft"]["p50"], one["ttft"]["p50"]),
        "inter_token_mean": over(two["inter_token"]["mean"], one["inter_token"]["mean"]),
        "e2e_p50": over(two["e2e"]["p50"], one["e2e"]["p50"]),
    }


async def measure(url: str, api_key: str | None, settings: LoadSettings) -> dict[str, Any]:
    """One server under one load. Raises ServeError when it does not answer."""
    endpoint = Endpoint(url, api_key, settings)
    try:
        await endpoint.prepare()
        records, seconds, counters = await run_load(endpoint, settings)
    finally:
        await endpoint.close()
    return {"url": url, "model": endpoint.model, **summarise(records, seconds, counters)}


async def bench_async(
    urls: Sequence[str],
    levels: Sequence[int],
    settings: LoadSettings,
    api_keys: Sequence[str | None],
    runs: list[dict[str, Any]],
    save: Callable[[], None],
) -> None:
    """Every server at every concurrency, the servers in turn at each level so that both meet the same
    machine. Each measurement is added to `runs` and saved at once. Raises ServeError when a server does not
    answer.
    """
    keys = [*api_keys, *[None] * len(urls)]
    for level in levels:
        # users need work; arrivals are as many as were asked for
        least = 2 * level if settings.rate is None else 1
        here = replace(settings, concurrency=level, requests=max(settings.requests, least))
        run: dict[str, Any] = {"concurrency": level, "rate": settings.rate, "servers": []}
        for url, key in zip(urls, keys, strict=False):
            run["servers"].append(await measure(url, key, here))
            if len(run["servers"]) == 1:
                runs.append(run)
            else:
                run["ratios"] = ratios(run["servers"])
            save()


def run_bench(
    urls: Sequence[str],
    levels: Sequence[int],
    settings: LoadSettings,
    out: Path | None = None,
    api_keys: Sequence[str | None] = (),
    show: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measure; write `bench.json` and `bench.png` into `out` after each measurement, and `show` what there is
    at the end, however it ends. Raises ServeError when a server does not answer or a measured request fails,
    ConfigError when `out` cannot be a folder.
    """
    if not 1 <= len(urls) <= 2:
        raise ServeError(f"{len(urls)} servers are given; bench takes one, or two to compare")
    if not levels or min(levels) < 1:
        raise ServeError(f"concurrency is {list(levels)}; each level must be 1 or more")
    results = _no_results(settings)
    if out is not None:
        make_folder(out)
    try:
        asyncio.run(
            bench_async(urls, levels, settings, api_keys, results["runs"], lambda: _save(results, out))
        )
    finally:
        if results["runs"]:
            show(results)
    _check_answered(results)
    return results


def _check_answered(results: dict[str, Any]) -> None:
    """Raises ServeError when a measured request failed: numbers of the others alone must not pass for the
    server's."""
    bad = [(run["concurrency"], s) for run in results["runs"] for s in run["servers"] if s["failed"]]
    if bad:
        users, server = bad[0]
        failed, asked = server["failed"], server["requests"]
        count = "every request" if failed == asked else f"{failed} of {asked} requests"
        more = f" (and requests of {len(bad) - 1} more measurements)" if len(bad) > 1 else ""
        error = shorten(str(server["first_error"]), 500)
        raise ServeError(
            f"{server['url']} at concurrency {users}: {count} failed{more}; the first one with {error}"
        )


def _no_results(settings: LoadSettings) -> dict[str, Any]:
    """What `bench.json` holds before the first measurement."""
    told = {**asdict(settings), "prompts": len(settings.prompts)}
    return {
        "kind": "draftkit bench",
        "version": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"python": sys.version.split()[0], "system": platform.system(), "cpu": platform.machine()},
        # each run has its own
        "settings": {name: value for name, value in told.items() if name != "concurrency"},
        "runs": [],
    }


def _save(results: dict[str, Any], out: Path | None) -> None:
    """Write both files anew; a reader meets the old one or the new one, never half of one."""
    if out is None:
        return
    write_text(out / "bench.json", as_json(results, indent=1) + "\n")
    plot_bench(results, out / "bench.partial.png")
    (out / "bench.partial.png").replace(out / "bench.png")


def read_prompts(path: Path) -> tuple[str, ...]:
    """The first user message of every conversation in a JSONL file. Raises ServeError."""
    try:
        lines = path.read_text("utf-8").split("\n")  # splitlines() would end lines inside texts, too
    except (OSError, ValueError) as error:
        raise ServeError(
            f"{path}: needs JSONL rows with messages, turns or prompt: {reason(error)}"
        ) from error
    return tuple(
        _first_question(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )


def _first_question(line: str, place: str) -> str:
    """What the user says first in a row. Raises ServeError where that is no text."""
    try:
        row = json.loads(line)
        if "messages" in row:
            text = next((m["content"] for m in row["messages"] if m["role"] == "user"), None)
        else:
            text = row["turns"][0] if "turns" in row else row["prompt"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ServeError(
            f"{place}: needs JSONL rows with messages, turns or prompt: {reason(error)}"
        ) from error
    if not isinstance(text, str):
        raise ServeError(
            f"{place}: needs JSONL rows with messages, turns or prompt: the user's first message is no text"
        )
    return text


def print_bench(results: dict[str, Any]) -> None:
    """A table: one row per server and level, ratios below, and a note where tokens are not what was
    counted."""
    from rich.console import Console
    from rich.table import Table

    rate = results["settings"]["rate"]
    arrivals = "" if rate is None else f"; {rate:g} arrivals per second"
    table = Table(
        title=f"{results['settings']['max_tokens']} new tokens per request{arrivals}; latencies in ms"
    )
    for column in (
        "users",
        "server",
        "tok/s",
        "tok/s/user",
        "TTFT p50",
        "p99",
        "per token",
        "e2e p50",
        "accepted",
        "failed",
    ):
        table.add_column(column, justify="left" if column == "server" else "right")

    def shown(value: float | None, scale: float = 1, digits: int = 1) -> str:
        return "–" if value is None or not math.isfinite(value) else f"{value * scale:,.{digits}f}"

    for run in results["runs"]:
        for server in run["servers"]:
            table.add_row(
                str(run["concurrency"]),
                server["url"].removeprefix("http://"),
                shown(server["tokens_per_s"]),
                shown(server["tokens_per_s_per_user"]),
                shown(server["ttft"]["p50"], 1000),
                shown(server["ttft"]["p99"], 1000),
                shown(server["inter_token"]["mean"], 1000, 2),
                shown(server["e2e"]["p50"], 1000),
                shown(server["accepted_len"], 1, 2),
                str(server["failed"]),
            )
        if "ratios" in run:
            first = shown(run["ratios"]["tokens_per_s"], 1, 2)
            table.add_row(
                "", "first / second", first + " x", shown(run["ratios"]["tokens_per_s_per_user"], 1, 2) + " x"
            )
    guessed = {
        s["url"]: 0 for run in results["runs"] for s in run["servers"] if s["tokens_counted_by"] == "chunks"
    }
    if guessed:
        table.caption = f"no usage from {' and '.join(guessed)}: chunks are counted as tokens"
    console = Console()
    console.width = max(console.width, 110)  # a pipe is 80 wide, which cuts numbers
    console.print(table)


def plot_bench(results: dict[str, Any], path: Path) -> None:
    """Tokens per second overall against per user, one point per concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for place in range(len(results["runs"][0]["servers"])):
        rows = [(r["concurrency"], r["servers"][place]) for r in results["runs"] if place < len(r["servers"])]
        points = [
            (s["tokens_per_s_per_user"], s["tokens_per_s"], c) for c, s in rows if s["tokens_per_s_per_user"]
        ]
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", label=rows[0][1]["url"])
        for per_user, overall, users in points:
            axes.annotate(
                str(users), (per_user, overall), textcoords="offset points", xytext=(4, 4), fontsize=8
            )
    axes.set(xlabel="tokens/s per user", ylabel="tokens/s overall", title="label: concurrent users")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)

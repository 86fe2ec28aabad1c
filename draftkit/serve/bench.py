"""`draftkit bench`: speed of OpenAI-compatible servers under load, one alone or two in one run with
ratios."""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from draftkit import __version__
from draftkit.errors import ServeError, reason
from draftkit.output import as_json, make_folder, write_text
from draftkit.progress import progress_bar
from draftkit.serve.bench_report import plot_bench
from draftkit.serve.load import Endpoint, Record, run_load
from draftkit.serve.problem import shorten
from draftkit.serve.settings import LoadSettings

PERCENTILES = (50, 90, 99)


def summarise(records: Sequence[Record], seconds: float, counters: dict[str, float]) -> dict[str, Any]:
    """Numbers of one run. Latencies in seconds; `tokens_per_s` overall, `tokens_per_s_per_user` is the median
    over requests of output tokens / e2e time (`request_speeds`), with its 95 % interval; accepted length
    counts the bonus token, 1 + accepted / rounds. `tokens_counted_by` is "chunks" where the server left out
    the usage of an answer: a chunk may hold several tokens.
    """
    good = [r for r in records if r.error is None and r.first is not None and r.done is not None]
    first = [r.first - r.sent for r in good if r.first is not None]
    whole = [r.done - r.sent for r in good if r.done is not None]
    gaps = [gap for r in good for gap in r.gaps]
    tokens = sum(r.output_tokens for r in good)
    speeds = [r.output_tokens / w for r, w in zip(good, whole, strict=True)]

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
        "tokens_per_s_per_user": median(speeds) if good else None,
        "tokens_per_s_per_user_95": median_interval(speeds),
        "request_speeds": speeds,
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
    share: float | None = None
    rounds = drafted = accepted = 0.0
    if told:
        source = "responses"
        rounds = sum(s.get("num_spec_steps") or 0 for s in told)
        drafted = sum(s.get("num_draft_tokens") or 0 for s in told)
        accepted = sum(s.get("num_accepted_draft_tokens") or 0 for s in told)
        could = sum((s.get("num_spec_tokens") or 0) * (s.get("num_spec_steps") or 0) for s in told)
        share = drafted / could if could else None
    elif counters.get("spec_decode_num_drafts_total"):
        source = "metrics"
        rounds = counters["spec_decode_num_drafts_total"]
        drafted = counters.get("spec_decode_num_draft_tokens_total", 0.0)
        accepted = counters.get("spec_decode_num_accepted_tokens_total", 0.0)
    return {
        "accepted_len": 1 + accepted / rounds if rounds else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "accepted_len_source": source if rounds else None,
        "drafted_share": share,  # of rounds; in the others the drafter rested
    }


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of a median; None of fewer than two values."""
    if len(values) < 2:
        return None
    low, high = np.percentile(_medians(values, 0), [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(one: Sequence[float], two: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the ratio of two medians; None of fewer than two values each."""
    if min(len(one), len(two)) < 2:
        return None
    low, high = np.percentile(_medians(one, 0) / _medians(two, 1), [2.5, 97.5])
    return float(low), float(high)


def _medians(values: Sequence[float], seed: int) -> Any:
    """Medians of 2,000 resamples."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (2000, len(values)))
    return np.median(np.asarray(values)[drawn], 1)


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


@dataclass(frozen=True)
class Arm:
    """What is measured: a server, and fields that its requests have besides those of all."""

    label: str
    url: str
    api_key: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def arms_of(urls: Sequence[str], api_keys: Sequence[str | None], compare_drafts: bool) -> list[Arm]:
    """One arm per server, or one server with its drafts and without. Raises ServeError for other numbers."""
    if not 1 <= len(urls) <= 2:
        raise ServeError(f"{len(urls)} servers are given; bench takes one, or two to compare")
    keys = [*api_keys, *[None] * len(urls)]
    if not compare_drafts:
        return [Arm(url.removeprefix("http://"), url, key) for url, key in zip(urls, keys, strict=False)]
    if len(urls) != 1:
        raise ServeError("--compare-drafts: give one --url, whose server is measured with drafts and without")
    return [Arm(f"drafts {way}", urls[0], keys[0], {"draft": way == "on"}) for way in ("on", "off")]


async def measure(arm: Arm, settings: LoadSettings) -> dict[str, Any]:
    """One server under one load, with its progress. Raises ServeError when it does not answer."""
    endpoint = Endpoint(arm.url, arm.api_key, replace(settings, extra={**settings.extra, **arm.extra}))
    try:
        await endpoint.prepare()
        with progress_bar(f"{arm.label}, {settings.concurrency} users", settings.requests) as bar:
            records, seconds, counters = await run_load(endpoint, settings, lambda: bar.update(advance=1))
    finally:
        await endpoint.close()
    told = summarise(records, seconds, counters)
    return {"url": arm.url, "label": arm.label, "model": endpoint.model, **told}


async def bench_async(
    arms: Sequence[Arm],
    levels: Sequence[int],
    settings: LoadSettings,
    runs: list[dict[str, Any]],
    save: Callable[[], None],
) -> None:
    """Every server at every concurrency, the servers in turn at each level so that both meet the same
    machine. Each measurement is added to `runs` and saved at once. Raises ServeError when a server does not
    answer.
    """
    for level in levels:
        # users need work; arrivals are as many as were asked for
        least = 2 * level if settings.rate is None else 1
        here = replace(settings, concurrency=level, requests=max(settings.requests, least))
        run: dict[str, Any] = {"concurrency": level, "rate": settings.rate, "servers": []}
        for arm in arms:
            run["servers"].append(await measure(arm, here))
            if len(run["servers"]) == 1:
                runs.append(run)
            else:
                run["ratios"] = ratios(run["servers"])
                speeds = [server["request_speeds"] for server in run["servers"]]
                run["ratio_per_user_95"] = ratio_interval(speeds[0], speeds[1])
            save()


def run_bench(
    urls: Sequence[str],
    levels: Sequence[int],
    settings: LoadSettings,
    out: Path | None = None,
    api_keys: Sequence[str | None] = (),
    show: Callable[[dict[str, Any]], None] = lambda results: None,
    compare_drafts: bool = False,
) -> dict[str, Any]:
    """Measure; write `bench.json` and `bench.png` into `out` after each measurement, and `show` what there is
    at the end, however it ends. Raises ServeError when a server does not answer or a measured request fails,
    ConfigError when `out` cannot be a folder.
    """
    arms = arms_of(urls, api_keys, compare_drafts)
    if not levels or min(levels) < 1:
        raise ServeError(f"concurrency is {list(levels)}; each level must be 1 or more")
    results = _no_results(settings)
    if out is not None:
        make_folder(out)
    try:
        asyncio.run(bench_async(arms, levels, settings, results["runs"], lambda: _save(results, out)))
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

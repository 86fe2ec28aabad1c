"""Thousands of right, nearly right and wrong requests against the real server process with the real engine.

    python -m checks.fuzz --cases 5000 --out checks/results/fuzz.json

Bodies are drawn from the server's own /openapi.json, and one case in eight is below JSON: broken bytes, other
methods, content types and paths. No answer may be a 5xx (nothing here asks for 503 or 429), every refusal
must say why, every stream must end, and a second client that asks a greedy question all the time must get the
same answer throughout. Exit code 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.progress import Progress

from benchmarks.result_file import print_result
from benchmarks.server_process import PATIENCE, ServerProcess, server_process
from checks.openapi_cases import Raw, bodies, raws

MESSAGES = [{"role": "user", "content": "Solve for x: 3x + 4 = 19."}]
ENDS = ("response.completed", "response.incomplete", "message_stop")
CONTROL: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 32, "temperature": 0}
REFUSALS = (400, 404, 405, 413, 415)
OPTIONS = ("--port", "0", "--max-length", "256")


@dataclass
class Report:
    """`statuses` counts by "METHOD path" and status, `refused` by the first field that a 400 named;
    `controls` are the second client's answers."""

    cases: int = 0
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    failures: list[str] = field(default_factory=list)
    controls: int = 0
    wrong_controls: int = 0
    tracebacks: int = 0
    leaked_blocks: int = 0
    ready_at_end: bool = False
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Nothing is wrong, and there was something that could be."""
        wrong = self.failures or self.wrong_controls or self.tracebacks or self.leaked_blocks
        return not wrong and self.ready_at_end and self.cases > 0 and self.controls > 0

    @property
    def by_status(self) -> dict[str, int]:
        """Cases by status, all routes together."""
        return dict(sorted(sum(self.statuses.values(), Counter()).items()))


def fuzz(server: ServerProcess, cases: int) -> Report:
    """Send `cases` requests, one after another, beside the second client."""
    report, began = Report(), time.perf_counter()
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        described = http.get("/openapi.json").json()
        definitions = described["components"]["schemas"]
        posts = {path: _body_of(routes) for path, routes in described["paths"].items() if "post" in routes}
        shaped = [
            bodies(path, schema, definitions).map(partial(_as_raw, path)) for path, schema in posts.items()
        ]
        below = raws(list(described["paths"]), CONTROL)
        everything = st.integers(0, 7).flatmap(lambda dice: st.one_of(shaped) if dice else below)
        with _controlled(server, report), Progress() as progress:
            bar = progress.add_task("cases", total=cases)

            @seed(0)
            @settings(
                max_examples=cases,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(everything)
            def send(case: Raw) -> None:
                _send(http, case, report)
                progress.advance(bar)

            send()
        server.wait_until_idle()
        report.leaked_blocks = int(server.metric("kv_blocks_used"))
        report.ready_at_end = http.get("/ready").status_code == 200
    report.tracebacks = sum("Traceback" in line for line in server.log)
    report.seconds = time.perf_counter() - began
    return report


def _body_of(routes: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = routes["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema


def _as_raw(path: str, body: dict[str, Any]) -> Raw:
    return Raw("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})


def _send(http: httpx.Client, case: Raw, report: Report) -> None:
    """One request; what is wrong with its answer goes into the report."""
    report.cases += 1
    try:
        response = http.request(case.method, case.path, content=case.content, headers=case.headers)
    except httpx.HTTPError as error:
        report.failures.append(f"{_short(case)}: {error!r}")
        return
    known = (
        case.path
        if response.status_code != 404 or case.path.startswith("/v1/c")
        else "(unknown paths and models)"
    )
    report.statuses.setdefault(f"{case.method} {known}", Counter())[str(response.status_code)] += 1
    try:
        wrong = what_is_wrong(response, case.method)
    except ValueError:
        wrong = f"not JSON: {response.text[:200]!r}"
    if response.status_code == 400 and not wrong and case.method != "HEAD":
        report.refused[str(response.json()["error"].get("param")).split(".")[0]] += 1
    report.streams += response.headers.get("content-type", "").startswith("text/event-stream")
    if wrong:
        report.failures.append(f"{_short(case)}: {response.status_code}: {wrong}")


def _short(case: Raw) -> str:
    return f"{case.method} {case.path} {case.headers} {case.content[:1000]!r}"


def what_is_wrong(response: httpx.Response, method: str) -> str:
    """Empty for a good answer. Raises ValueError for a body that should be JSON and is not."""
    if response.status_code in REFUSALS:
        if method == "HEAD":
            return ""
        error = response.json().get("error", {})
        return (
            ""
            if error.get("message")
            and (error.get("code") == response.status_code or response.json().get("type") == "error")
            else f"no reason: {response.text[:200]}"
        )
    if response.status_code != 200:
        return response.text[:200]
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        told = [json.loads(event) for event in events if event != "[DONE]"]
        ends = events[-1:] == ["[DONE]"] or (told and told[-1].get("type") in ENDS)
        broken = not ends or any("error" in event for event in told)
        return "a stream that does not end well" if broken else ""
    if response.headers.get("content-type") == "application/json" and method != "HEAD":
        response.json()
    return ""


@contextmanager
def _controlled(server: ServerProcess, report: Report) -> Iterator[None]:
    """A second client asks the same greedy question until the block ends."""
    stop = threading.Event()

    def ask(http: httpx.Client) -> str:
        response = http.post("/v1/chat/completions", json=CONTROL)
        return (
            str(response.json()["choices"][0]["message"]["content"])
            if response.status_code == 200
            else "no answer"
        )

    def ask_on(wanted: str) -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            while not stop.wait(0.05):
                report.wrong_controls += ask(http) != wanted
                report.controls += 1

    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
        thread = threading.Thread(target=ask_on, args=(ask(http),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with server_process(*OPTIONS) as server:
        report = fuzz(server, options.cases)
    fields = {
        **vars(report),
        "failures": report.failures[:20],
        "statuses": dict(sorted(report.statuses.items())),
    }
    fields["refused"] = dict(report.refused.most_common())
    result = {"good": report.good, "by_status": report.by_status, **fields}
    print_result(result, options.out)
    raise SystemExit(not report.good)


if __name__ == "__main__":
    main()

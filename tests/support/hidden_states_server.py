"""A server that speaks as vLLM does with `extract_hidden_states`: completions of token ids, whose answer
names a file of hidden states, in the form of ExampleHiddenStatesConnector or of hs-connectors' fp8 one."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from hs_connectors.fp8_utils import SCALES_KEY, quantize_tensor_to_fp8
from safetensors.torch import save_file

from draftkit.target.transformers import TransformersTarget


def states_of(target: TransformersTarget, tokens: list[int], ids: list[int]) -> torch.Tensor:
    """[tokens, ids, H]. `ids` count hidden states, 0 is the embedding; the last layer's is taken before the
    norm."""
    read = torch.tensor([tokens])

    def take(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found.append(hidden.mean(2) if hidden.ndim == 4 else hidden)  # DeepSeek-V4: of its streams

    with torch.inference_mode():
        found = [target.embed(read)]
        hooks = [layer.register_forward_hook(take) for layer in target.layers]
        target.model(read, use_cache=False)
        for hook in hooks:
            hook.remove()
    return torch.stack([found[i][0] for i in ids], 1).contiguous()


@contextmanager
def hidden_states_server(
    target: TransformersTarget, ids: list[int], folder: Path, fp8: bool = False, extracts: bool = True
) -> Iterator[str]:
    """Its URL; it gives `states_of`."""
    lock, count = threading.Lock(), iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, body: dict[str, Any]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "model" and body["max_tokens"] == 1
            if not extracts:
                self.answer({"choices": [{"text": "x"}], "kv_transfer_params": None})
                return
            path = folder / f"request-{next(count)}.safetensors"
            held = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
            threading.Thread(target=self.write, args=(path, body["prompt"], held)).start()
            self.answer({"choices": [{"text": "x"}], "kv_transfer_params": {"hidden_states_path": str(path)}})

        def write(self, path: Path, prompt: list[int], held: int) -> None:
            with lock:
                hidden = states_of(target, prompt, ids)
            tensors = {"hidden_states": hidden, "token_ids": torch.tensor(prompt)}
            if fp8:
                tensors["hidden_states"], tensors[SCALES_KEY] = quantize_tensor_to_fp8(hidden)
            save_file(tensors, path)
            os.close(held)

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # 16 connections at once are more than the 5 that usually may wait

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

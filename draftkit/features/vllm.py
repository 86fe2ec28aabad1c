"""Features from a running vLLM server: its method `extract_hidden_states`, and the package `hs-connectors`
for the way from there to here.

The server is started with

    vllm serve MODEL --no-enable-prefix-caching --speculative-config '{"method": "extract_hidden_states",
        "num_speculative_tokens": 1, "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids":
        [2, 10, 18, 26, 34, 36]}}}' --kv-transfer-config '{"kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer", "kv_connector_extra_config": {"shared_storage_path": "/shared/folder"}}'

(or hs-connectors' fp8 connector) on a disk that both sides see. Its ids count hidden states, where 0 is the
embedding: OUTPUT index i of draftkit is id i + 1. The last id, the number of layers, is the stream before the
final norm, which is applied here.

Shapes: T tokens, E tokens read, F = K * H, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor, nn

from draftkit.errors import ConfigError, ServeError
from draftkit.features.compute import cut_windows, longest_of
from draftkit.features.probe import compare_states
from draftkit.features.record import Text
from draftkit.target.interface import Target, TargetInfo

CONNECTORS = "0.9."  # of hs-connectors: the form of its files and of what it returns
AT_ONCE = 16  # requests
WAIT_SECONDS = 600.0  # for an answer, and for its file
PROBE_TOKENS = 24


@dataclass(frozen=True)
class Wanted:
    """What a server must give: the target's sizes, layers as OUTPUT indices, and its final norm. Without a
    norm the last hidden states are not asked for: those of a family with several residual streams cannot be
    made of what the server gives, which is the mean of the streams after a layer, as drafters read it."""

    info: TargetInfo
    layers: tuple[int, ...]
    norm: nn.Module | None

    @property
    def ids(self) -> list[int]:
        """The layers, and the last hidden state, as the server numbers them."""
        return [*(layer + 1 for layer in self.layers), *([self.info.num_layers] if self.norm else [])]

    @torch.inference_mode()
    def split(self, sample: dict[str, Tensor], tokens_E: Tensor) -> tuple[Tensor, Tensor]:
        """Features [E, F] and last hidden states after the norm [E, H] (without one [E, 0]) of what
        hs-connectors gives of a text: `hidden_states` [E, layers, H], `token_ids` [E]. Raises ValueError that
        says what differs."""
        hidden_EKH, read_E = sample.get("hidden_states"), sample.get("token_ids")
        if hidden_EKH is None or read_E is None:
            raise ValueError(f"gives {', '.join(sorted(sample)) or 'nothing'}, no hidden_states or token_ids")
        if not torch.equal(read_E.to(tokens_E), tokens_E):
            raise ValueError("gives the states of other tokens")
        shape = [len(tokens_E), len(self.ids), self.info.hidden_size]
        if list(hidden_EKH.shape) != shape or not hidden_EKH.is_floating_point():
            kind = str(hidden_EKH.dtype).removeprefix("torch.")
            raise ValueError(f"gives {list(hidden_EKH.shape)} numbers ({kind}) where {shape} are wanted")
        last_EH = self.norm(hidden_EKH[:, -1].float()) if self.norm else hidden_EKH[:, 0, :0]
        return hidden_EKH[:, : len(self.layers)].flatten(1), last_EH


class VllmReader:
    """Reads texts by a server, several at a time. Raises ServeError that names the server when it is not
    there, extracts nothing, or other layers; ConfigError when hs-connectors is missing or another version."""

    def __init__(self, url: str, wanted: Wanted) -> None:
        self._transfer = connector_files("--from vllm", Path())
        self.url, self._wanted = url.rstrip("/"), wanted
        self._client = httpx.Client(base_url=self.url, timeout=WAIT_SECONDS)
        self._model = self._first_model()

    def read(self, texts: Sequence[Text], last_hidden: bool = True) -> list[tuple[Tensor, Tensor]]:
        """See `Reader`; on the CPU, both where there is a norm. A server that batches freely does not give
        the same bits every time."""
        longest = longest_of(texts)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            read = dict(zip(longest, pool.map(lambda i: self._one(texts[i].tokens_E), longest), strict=True))
        return cut_windows(texts, longest, read)

    def probe(self, target: Target) -> None:
        """Read a few tokens by both and compare. Raises ServeError that says which layer the server gave
        instead, or that its model is another one."""
        wanted, vocab = self._wanted, self._wanted.info.vocab_size
        tokens_E = torch.arange(PROBE_TOKENS) * 7919 % max(1, vocab - 1)
        advice = f"start it with eagle_aux_hidden_state_layer_ids {wanted.ids} and this very model"
        states, last = self._one(tokens_E), wanted.norm is not None
        compare_states(self.url, ServeError, target, wanted.layers, tokens_E, states, last, advice)

    def _one(self, tokens_E: Tensor) -> tuple[Tensor, Tensor]:
        """Features [E, F] and last hidden states after the norm [E, H] (without one [E, 0]) of one text."""
        body = {"model": self._model, "prompt": tokens_E.tolist(), "max_tokens": 1, "temperature": 0}
        answer = self._ask("post", "/v1/completions", json=body)
        params = answer.get("kv_transfer_params")
        if not params:
            raise ServeError(
                f"{self.url}: extracts no hidden states; start it with the method extract_hidden_states "
                f"and layer ids {self._wanted.ids}, see docs/features.md"
            )
        handle = params.get("hidden_states_path") or params.get("handle")
        try:
            sample = self._written(params)
        except OSError as error:
            raise ServeError(
                f"{self.url}: {handle} cannot be read here ({error}); share its folder"
            ) from error
        if sample is None:
            raise ServeError(
                f"{self.url}: wrote {handle}, which is not there; share its folder with this machine"
            )
        self._transfer.delete(handle)
        Path(f"{handle}.lock").unlink(missing_ok=True)
        try:
            return self._wanted.split(sample, tokens_E)
        except ValueError as error:
            told = f"{error}; start it with layer ids {self._wanted.ids} and this model"
            raise ServeError(f"{self.url}: {told}") from error

    def _written(self, params: dict[str, Any]) -> dict[str, Tensor] | None:
        """What the server writes of a request. It does so in its next step, which may take longer than the
        ten seconds that hs-connectors waits."""
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                sample: dict[str, Tensor] | None = self._transfer.get_generated(params)
                return sample
            except TimeoutError:
                if time.monotonic() > until:
                    raise

    def _first_model(self) -> str:
        models = self._ask("get", "/v1/models").get("data") or []
        if not models:
            raise ServeError(f"{self.url}: serves no model; start it with one")
        return str(models[0]["id"])

    def _ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, **body)
            response.raise_for_status()
            found: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServeError(
                f"{self.url}: {path} fails ({error}); start it and run the same again"
            ) from error
        return found


def connector_files(asked_by: str, folder: Path) -> Any:
    """What reads the files of vLLM's connectors, of half or eight bits alike; those that were kept lie in
    `folder`. Raises ConfigError when hs-connectors is missing or another version."""
    try:
        import hs_connectors
    except ImportError as error:
        raise ConfigError(f"{asked_by}: needs hs-connectors; pip install 'draftkit[vllm]'") from error
    if not (found := version("hs-connectors")).startswith(CONNECTORS):
        raise ConfigError(
            f"{asked_by}: hs-connectors {found} is installed, this draftkit knows {CONNECTORS}x"
        )
    return hs_connectors.FP8Transfer(folder)

"""Any Transformers causal language model as a target.

Shapes: B batch, T new tokens, S cached + new tokens, H hidden size, V vocabulary, F = K * H.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from draftkit.errors import TargetError
from draftkit.target.interface import TargetCache, TargetInfo, TargetOutput

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class DynamicTargetCache:
    """A Transformers `DynamicCache` that is cropped from its end."""

    def __init__(self) -> None:
        self.inner = DynamicCache()

    @property
    def length(self) -> int:
        """Tokens held."""
        return int(self.inner.get_seq_length())

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises TargetError where the cache cannot (hybrid models)."""
        surplus = self.length - length
        if surplus:
            try:
                self.inner.crop(-surplus)  # a negative number removes that many from the end
            except (NotImplementedError, ValueError) as error:
                raise TargetError(f"this target's cache cannot be cropped: {error}") from error


class TransformersTarget:
    """A frozen `AutoModelForCausalLM`. Features come from forward hooks on the chosen layers alone."""

    def __init__(self, model: Any, info: TargetInfo) -> None:
        self.model = model.eval().requires_grad_(False)
        self.info = info
        self._base = getattr(model, model.base_model_prefix)
        self._layers = _decoder_layers(self._base)
        self._head = model.get_output_embeddings()
        text = model.config.get_text_config()
        self._soft_cap: float | None = getattr(text, "final_logit_softcapping", None)
        self._captured: dict[int, Tensor] = {}
        self._hooked: tuple[int, ...] = ()
        self._handles: list[Any] = []

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._head.weight.device

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., H]."""
        return self._base.get_input_embeddings()(tokens)

    def embedding_weight(self) -> Tensor:
        """[V, H]."""
        return self._base.get_input_embeddings().weight

    def head_weight(self) -> Tensor:
        """[V, H]."""
        return self._head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm [..., H] to logits [..., V]."""
        logits: Tensor = self._head(hidden)
        return torch.tanh(logits / self._soft_cap) * self._soft_cap if self._soft_cap else logits

    def new_cache(self) -> DynamicTargetCache:
        """An empty cache."""
        return DynamicTargetCache()

    @torch.inference_mode()
    def forward(
        self,
        tokens_BT: Tensor,
        cache: TargetCache | None,
        feature_layers: tuple[int, ...] = (),
        mask_BS: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> TargetOutput:
        """Read `tokens_BT` behind what the cache holds (see `Target.forward`)."""
        self._hook(feature_layers)
        output = self._base(
            input_ids=tokens_BT,
            attention_mask=mask_BS,
            position_ids=positions_BT,
            past_key_values=cast(DynamicTargetCache, cache).inner if cache is not None else None,
            use_cache=cache is not None,
        )
        features = torch.cat([self._captured[i] for i in sorted(feature_layers)], -1) if feature_layers else None
        self._captured.clear()
        return TargetOutput(output.last_hidden_state, features)

    def _hook(self, layers: tuple[int, ...]) -> None:
        if layers == self._hooked:
            return
        check_feature_layers(layers, self.info.num_layers)
        for handle in self._handles:
            handle.remove()
        self._handles = [self._layers[i].register_forward_hook(self._capture(i)) for i in layers]
        self._hooked = layers

    def _capture(self, layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook


def check_feature_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Raise TargetError unless the ids are distinct and within 0..num_layers - 2 (layer OUTPUT indices)."""
    if len(set(layers)) != len(layers) or any(not 0 <= i <= num_layers - 2 for i in layers):
        raise TargetError(f"feature layers {list(layers)}: choose distinct ids between 0 and {num_layers - 2}")


def spread_feature_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """`count` layer ids spread evenly over 1..num_layers - 2, for example (1, 9, 17, 25, 33) of 36 with another end."""
    last = num_layers - 2
    if not 1 <= count <= last:
        raise TargetError(f"{count} feature layers of a target with {num_layers} layers: choose 1 to {last}")
    if count == 1:
        return (last,)
    return tuple(round(1 + i * (last - 1) / (count - 1)) for i in range(count))


def load_target(
    path: str, revision: str | None = None, dtype: str = "float32", device: str = "cpu"
) -> TransformersTarget:
    """Load a folder or a hub id; "tiny" is the embedded target.

    Safetensors only, no remote code. Raises TargetError when it is not there, has no weights or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise TargetError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    folder = resolve_target(path)
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, revision=revision, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise TargetError(f"{path}: cannot load a target: {str(error).strip().splitlines()[0]}") from error
    text = config.get_text_config()
    info = TargetInfo(
        name=path,
        revision=revision,
        fingerprint=fingerprint(folder, config, model),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        hidden_size=int(text.hidden_size),
        num_layers=int(text.num_hidden_layers),
        stop_token_ids=_stop_tokens(model),
        max_length=int(getattr(text, "max_position_embeddings", 2048)),
        family=str(text.model_type),
    )
    return TransformersTarget(model.to(device), info)


def resolve_target(path: str) -> str:
    """The folder of the embedded target for "tiny"; a local folder is checked for a configuration and weights."""
    folder = EMBEDDED if path == "tiny" else Path(path)
    if not folder.is_dir():
        return path  # a hub id
    if not (folder / "config.json").exists():
        raise TargetError(f"{path}: has no config.json; give a folder that `save_pretrained` wrote, or a hub id")
    if not list(folder.glob("*.safetensors")):
        raise TargetError(f"{path}: has no *.safetensors; draftkit loads safetensors only, convert the weights first")
    return str(folder)


def fingerprint(folder: str, config: Any, model: nn.Module) -> str:
    """sha256 over the configuration's shape and the weights: whole files up to 64 MiB, else size and first MiB."""
    digest = hashlib.sha256()
    local = Path(folder)
    if local.is_dir():
        for path in sorted([*local.glob("*.safetensors"), local / "config.json", local / "tokenizer.json"]):
            if path.exists():
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    digest.update(file.read() if path.stat().st_size <= 2**26 else file.read(2**20))
    else:
        digest.update(json.dumps([folder, getattr(config, "_commit_hash", None)]).encode())
        digest.update(str(sum(p.numel() for p in model.parameters())).encode())
    return digest.hexdigest()


def _stop_tokens(model: Any) -> tuple[int, ...]:
    found = getattr(model.generation_config, "eos_token_id", None) or model.config.get_text_config().eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def _decoder_layers(base: Any) -> nn.ModuleList:
    for owner in (base, getattr(base, "language_model", None), getattr(base, "decoder", None)):
        for name in ("layers", "h", "blocks"):
            layers = getattr(owner, name, None)
            if isinstance(layers, nn.ModuleList):
                return layers
    raise TargetError(f"{type(base).__name__}: no list of decoder layers found; features cannot be captured")

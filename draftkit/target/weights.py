"""What a target's files say, without loading the model: sizes, single tensors by name, the fingerprint.

Training from a feature store, export and hand-over need no more than this. The names come from the model's
skeleton, which has no weights.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.hub import cached_file

from draftkit.errors import TargetError
from draftkit.target.fingerprint import fingerprint
from draftkit.target.interface import TargetInfo
from draftkit.target.loading import (
    UNREADABLE,
    checked_config,
    longest_context,
    resolve_target,
    said,
    stop_tokens,
)
from draftkit.target.shards import tensor_places
from draftkit.target.transformers import DTYPES, TransformersTarget

DEEPSEEK_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


class StoredModule:
    """A module of the target as it lies in the files; `state_dict` reads it."""

    def __init__(self, files: TargetFiles, skeleton: nn.Module, prefix: str) -> None:
        self._files, self._skeleton, self._prefix = files, skeleton, prefix

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, parameters and buffers that are saved."""
        return {name: self._files.tensor(f"{self._prefix}.{name}") for name in self._skeleton.state_dict()}

    def loaded(self) -> nn.Module:
        """The module with its tensors, in float32."""
        module = copy.deepcopy(self._skeleton).to_empty(device="cpu").float()
        module.load_state_dict(self.state_dict())
        return module


class TargetFiles:
    """A target's files. It answers what `TransformersTarget` answers about sizes and weights; the tensors are
    on the CPU, in `dtype`, and each is read when it is asked for."""

    device = torch.device("cpu")

    def __init__(self, path: str, revision: str | None = None, dtype: str = "float32") -> None:
        """Raises TargetError when there is no configuration, no safetensors, or a family that has no
        skeleton."""
        self._name, self._dtype = path, DTYPES[dtype]
        source = resolve_target(path, revision)
        checked_config(path, source, revision)
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            self._place_of = tensor_places(source, revision)
            folder = Path(str(cached_file(source, "config.json", revision=revision))).parent
            if (folder / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(folder)
        except UNREADABLE as error:
            raise TargetError(f"{path}: its files cannot be read: {said(error)}") from error
        self.text_config = config.get_text_config()
        self.info = TargetInfo(
            name=path,
            revision=folder.name if folder.parent.name == "snapshots" else revision,
            fingerprint=fingerprint(folder),
            vocab_size=int(model.get_output_embeddings().weight.shape[0]),
            hidden_size=int(self.text_config.hidden_size),
            num_layers=int(self.text_config.num_hidden_layers),
            stop_token_ids=stop_tokens(model, path),
            max_length=longest_context(self.text_config),
            family=str(self.text_config.model_type),
        )
        self._skeleton = TransformersTarget(model, self.info)
        self._names = {id(module): name for name, module in model.named_modules()}
        self.layers = [self._stored(layer) for layer in self._skeleton.layers]
        tied = self.text_config.tie_word_embeddings or getattr(config, "tie_word_embeddings", False)
        self._embedding = self._name_of(model.base_model.get_input_embeddings())
        self._head = self._embedding if tied else self._name_of(model.get_output_embeddings())
        self._read = cache(self._read_tensor)  # embedding and head are asked for more than once

    def embedding_weight(self) -> Tensor:
        """[V, H]."""
        return self._read(self._embedding)

    def head_weight(self) -> Tensor:
        """[V, H]; the embedding itself where the two are tied."""
        return self._read(self._head)

    def final_norm(self) -> StoredModule:
        """The norm after the last layer. Raises TargetError when the family has none where most have it."""
        return self._stored(self._skeleton.final_norm())

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the model. Raises TargetError when the files lack it or hold it
        quantised."""
        return self._read_tensor(name)

    def _stored(self, module: nn.Module) -> StoredModule:
        return StoredModule(self, module, self._names[id(module)])

    def _name_of(self, module: nn.Module) -> str:
        return f"{self._names[id(module)]}.weight"

    def _read_tensor(self, name: str) -> Tensor:
        written = name if name in self._place_of else self._other_name(name)
        path = self._place_of[written]
        try:
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor(written)
        except (OSError, SafetensorError) as error:
            raise TargetError(f"{path}: is damaged ({error}); copy it again") from error
        if not found.is_floating_point() or found.element_size() == 1:
            raise TargetError(
                f"{self._name}: {written} is quantised; give a checkpoint whose embedding and head are not"
            )
        return found.to(self._dtype)

    def _other_name(self, name: str) -> str:
        """The one name in the files that has the same end: some families are saved under another prefix.
        DeepSeek names embedding, norm and head in its own way."""
        if (theirs := DEEPSEEK_NAMES.get(name)) in self._place_of:
            return str(theirs)
        ends = [name.split(".", cut)[-1] for cut in range(1, name.count("."))]
        for end in ends:
            found = [known for known in self._place_of if known == end or known.endswith("." + end)]
            if len(found) == 1:
                return found[0]
        raise TargetError(f"{self._name}: has no tensor {name}; give the complete checkpoint")

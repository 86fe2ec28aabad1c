"""Any Transformers causal language model as a target.

Shapes: B batch, T new tokens, S cached + new tokens, H hidden size, V vocabulary, F = K * H.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from draftkit.errors import TargetError
from draftkit.target.cache import DynamicTargetCache, ReplayTargetCache, needs_replay
from draftkit.target.interface import TargetCache, TargetInfo, TargetOutput

# families whose layers give several residual streams [B, T, N, H], of which drafters read the mean
STREAM_MEANS = frozenset({"deepseek_v4"})
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class TransformersTarget:
    """A frozen `AutoModelForCausalLM`. Features come from forward hooks on the chosen layers alone.

    Raises TargetError when the model's parts are not where Transformers models have them.
    """

    def __init__(self, model: Any, info: TargetInfo) -> None:
        self.model = model.eval().requires_grad_(False)
        self.info = info
        self._base: Any = getattr(model, model.base_model_prefix, None)
        self._head: Any = model.get_output_embeddings()
        if self._base is None or self._head is None:
            raise TargetError(
                f"{info.name}: {type(model).__name__} has no base model with an output head; choose another"
            )
        self.layers, self._layer_owner = _decoder_layers(self._base)
        text = model.config.get_text_config()
        self._soft_cap: float | None = getattr(text, "final_logit_softcapping", None)  # Gemma
        self._factor: float | None = getattr(text, "logit_scale", None)  # Cohere
        self._divisor: float | None = getattr(text, "logits_scaling", None)  # Granite
        # Whether rows of a batch may be padded on the left, and padding be kept in a cache: not where
        # neighbouring tokens are compressed into one entry, nor where `check_target` says otherwise.
        self.pads_left = info.family not in STREAM_MEANS
        self._replay = needs_replay(model)
        self._captured: dict[int, Tensor] = {}
        self._hooked: tuple[int, ...] = ()
        self._handles: list[Any] = []

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._head.weight.device

    @property
    def last_tap(self) -> int:
        """The last layer that can be tapped."""
        return last_tap(self.info)

    @property
    def text_config(self) -> Any:
        """The Transformers configuration of the language model."""
        return self.model.config.get_text_config()

    def final_norm(self) -> nn.Module:
        """The norm after the last layer. Raises TargetError when the family has none where most have it."""
        norm = getattr(self._layer_owner, "norm", None)
        if not isinstance(norm, nn.Module):
            raise TargetError(
                f"{self.info.name}: family {self.info.family} has no final norm that draftkit knows"
            )
        return norm

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., H], as the embedding module gives them (Gemma 3 and 4:
        scaled)."""
        return self._base.get_input_embeddings()(tokens)

    def embedding_weight(self) -> Tensor:
        """[V, H]."""
        return self._base.get_input_embeddings().weight

    def head_weight(self) -> Tensor:
        """[V, H]."""
        return self._head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm [..., H] to logits [..., V], the family's scale and soft cap
        included."""
        logits: Tensor = self._head(hidden)
        if self._factor is not None:
            logits = logits * self._factor
        if self._divisor is not None:
            logits = logits / self._divisor
        return torch.tanh(logits / self._soft_cap) * self._soft_cap if self._soft_cap else logits

    def new_cache(self) -> DynamicTargetCache | ReplayTargetCache:
        """An empty cache; one that reads again after a crop for families with recurrent states."""
        if self._replay:
            return ReplayTargetCache(self.model.config, self._read_again)
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
        """Read `tokens_BT` after what the cache holds (see `Target.forward`).

        Attention is causal also for several new tokens after a cache. With a mask and no positions,
        positions count the real tokens, so that batches padded on the left or on the right read what each row
        would read alone. Raises TargetError for padding that the family cannot leave out (`pads_left`), and
        for layers whose output is not one stream of hidden states.
        """
        self._hook(feature_layers)
        if mask_BS is not None and not self.pads_left and not _is_right_padding(mask_BS, cache):
            raise TargetError(
                f"{self.info.name}: family {self.info.family} reads padding with the tokens after it; "
                "pad on the right, without a cache"
            )
        if mask_BS is not None and positions_BT is None:
            positions_BT = (mask_BS.cumsum(-1) - 1).clamp_min(0)[:, -tokens_BT.shape[1] :]
        count = tokens_BT.shape[1]
        if isinstance(cache, ReplayTargetCache):
            tokens_BT, positions_BT = cache.begin(tokens_BT, mask_BS, positions_BT)
        output = self._base(
            input_ids=tokens_BT,
            attention_mask=mask_BS,
            position_ids=positions_BT,
            past_key_values=cast(DynamicTargetCache, cache).inner if cache is not None else None,
            use_cache=cache is not None,
        )
        last = output.last_hidden_state
        features = self._joined(feature_layers, last.device)[:, -count:] if feature_layers else None
        return TargetOutput(last[:, -count:], features)

    @torch.inference_mode()
    def features(self, tokens_BT: Tensor, feature_layers: tuple[int, ...]) -> Tensor:
        """See `Target.features`."""
        self._hook(feature_layers)
        # registered last, so it is called once the highest layer's output is taken
        end = self.layers[max(feature_layers)].register_forward_hook(_end_of_pass)
        try:
            self._base(input_ids=tokens_BT, use_cache=False)
        except _EndOfPass:
            pass
        finally:
            end.remove()
        return self._joined(feature_layers, tokens_BT.device)

    def _joined(self, layers: tuple[int, ...], device: torch.device) -> Tensor:
        """What the hooks have taken, [B, T, F]; the layers may lie on several devices."""
        features_BTF = torch.cat([self._captured[i].to(device) for i in sorted(layers)], -1)
        self._captured.clear()
        return features_BTF

    def _read_again(
        self, tokens_BT: Tensor, cache: TargetCache, mask_BS: Tensor | None, positions_BT: Tensor | None
    ) -> None:
        self.forward(tokens_BT, cache, self._hooked, mask_BS, positions_BT)

    def _hook(self, layers: tuple[int, ...]) -> None:
        if layers == self._hooked:
            return
        check_feature_layers(layers, self.last_tap)
        for handle in self._handles:
            handle.remove()
        self._handles = [self.layers[i].register_forward_hook(self._capture(i)) for i in layers]
        self._hooked = layers

    def _tap(self, output: Tensor, layer: int) -> Tensor:
        """What a tap gives, [B, T, H]: a layer's output, or the mean over its residual streams."""
        if self.info.family in STREAM_MEANS and output.ndim == 4:
            return output.mean(2)
        if output.ndim != 3 or output.shape[-1] != self.info.hidden_size:
            raise TargetError(
                f"{self.info.name}: layer {layer} of family {self.info.family} gives {list(output.shape)}, "
                f"no hidden states [batch, tokens, {self.info.hidden_size}]; no drafter can be made for it"
            )
        return output

    def _capture(self, layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._captured[layer] = self._tap(output[0] if isinstance(output, tuple) else output, layer)

        return hook


class _EndOfPass(Exception):
    """No more of this pass is needed."""


def _end_of_pass(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _EndOfPass


def last_tap(info: TargetInfo) -> int:
    """The last layer that can be tapped: engines disagree on what the last one's output is, but for
    DeepSeek-V4."""
    return info.num_layers - (1 if info.family in STREAM_MEANS else 2)


def check_feature_layers(layers: tuple[int, ...], last: int) -> None:
    """Raise TargetError unless the ids are distinct and within 0..last (layer OUTPUT indices)."""
    if len(set(layers)) != len(layers) or any(not 0 <= i <= last for i in layers):
        raise TargetError(f"feature layers {list(layers)}: choose distinct ids between 0 and {last}")


def check_taps(target: TransformersTarget, layers: tuple[int, ...]) -> None:
    """Raise TargetError unless these layers can be tapped, each with one stream of hidden states."""
    check_feature_layers(layers, target.last_tap)
    target.forward(torch.zeros(1, 1, dtype=torch.int64, device=target.device), None, layers)


def _is_right_padding(mask_BS: Tensor, cache: TargetCache | None) -> bool:
    if cache is not None:
        return bool(mask_BS.all())
    return bool((mask_BS[:, 1:] <= mask_BS[:, :-1]).all() and mask_BS[:, 0].all())


def spread_feature_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """`count` layer ids spread evenly over 1..num_layers - 2, for example (1, 9, 17, 25, 33) of 36 with
    another end."""
    last = num_layers - 2
    if not 1 <= count <= last:
        raise TargetError(f"{count} feature layers of a target with {num_layers} layers: choose 1 to {last}")
    if count == 1:
        return (last,)
    return tuple(round(1 + i * (last - 1) / (count - 1)) for i in range(count))


NOTHING_LEFT_OUT: dict[str, Any] = {"missing_keys": (), "unexpected_keys": ()}


def _decoder_layers(base: Any) -> tuple[nn.ModuleList, Any]:
    """The decoder layers and the module that holds them."""
    for owner in (base, getattr(base, "language_model", None), getattr(base, "decoder", None)):
        for name in ("layers", "h", "blocks"):
            layers = getattr(owner, name, None)
            if isinstance(layers, nn.ModuleList):
                return layers, owner
    raise TargetError(f"{type(base).__name__}: no list of decoder layers found; features cannot be captured")

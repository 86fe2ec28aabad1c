"""The shape of DeepSeek-V4's DSpark module, from a recipe and its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from draftkit.draft.drafter import DrafterConfig
from draftkit.errors import ConfigError
from draftkit.settings import DrafterSettings

STAGES = 3


@dataclass(frozen=True, kw_only=True)
class DeepseekV4Shape(DrafterConfig):
    """The shape of a V4 draft module. `num_layers` are its stages, `intermediate_size` that of an expert,
    `block_size` gamma, `mask_token_id` the noise token; the rest are the target's numbers."""

    reads_last_layer: ClassVar[bool] = True

    q_lora_rank: int
    rope_dim: int
    o_groups: int
    o_lora_rank: int
    num_experts: int
    experts_per_token: int
    routed_scaling: float
    scoring: str
    swiglu_limit: float
    streams: int
    sinkhorn_iters: int
    hc_eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout != "anchor" or self.head != "markov" or self.draft_vocab_size or not self.window:
            raise ConfigError(
                "drafter: a dspark_v4 drafter has the layout anchor, the head markov, a window and the whole "
                "vocabulary; leave these fields out"
            )
        if (
            self.num_heads * self.head_dim % self.o_groups
            or self.rope_dim % 2
            or self.rope_dim > self.head_dim
        ):
            raise ConfigError(
                f"drafter: {self.num_heads} heads of {self.head_dim} do not go with {self.o_groups} groups "
                f"and {self.rope_dim} rotary channels; take the target's numbers"
            )

    @property
    def algorithm(self) -> str:
        """Its name in the table of algorithms."""
        return "dspark_v4"

    @property
    def numbers_per_token(self) -> int:
        """None: a request keeps the keys of its window, however long it is."""
        return 0


def target_sizes(text: Any) -> dict[str, Any]:
    """The fields of the shape that follow from a target's Transformers configuration alone. Raises
    ConfigError for another family."""
    if text.model_type != "deepseek_v4":
        raise ConfigError(
            f"drafter.algorithm: dspark_v4 is for DeepSeek-V4, the target is {text.model_type}; choose dspark"
        )
    return {
        "q_lora_rank": text.q_lora_rank,
        "rope_dim": text.qk_rope_head_dim,
        "o_groups": text.o_groups,
        "o_lora_rank": text.o_lora_rank,
        "num_experts": text.n_routed_experts,
        "experts_per_token": text.num_experts_per_tok,
        "routed_scaling": float(text.routed_scaling_factor),
        "scoring": text.scoring_func,
        "swiglu_limit": float(text.swiglu_limit),
        "streams": text.hc_mult,
        "sinkhorn_iters": text.hc_sinkhorn_iters,
        "hc_eps": text.hc_eps,
        "window": text.sliding_window,
    }


def shape_of(section: DrafterSettings, sizes: Mapping[str, Any], mask_token_id: int) -> DeepseekV4Shape:
    """The shape from a recipe and the target's sizes."""
    return DeepseekV4Shape(
        **(dict(sizes) | {"window": section.window or sizes["window"]}),
        mask_token_id=mask_token_id,
        layout=section.layout,
        head=section.head,
        draft_vocab_size=section.draft_vocab_size,
        markov_rank=section.markov_rank,
        confidence_with_markov=section.confidence_with_markov,
        confidence_stop_gradient=section.confidence_stop_gradient,
    )


def last_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """The target layers that it reads: the last ones."""
    if not 1 <= count <= num_layers:
        raise ConfigError(f"drafter.num_features: {count} of a target with {num_layers} layers")
    return tuple(range(num_layers - count, num_layers))

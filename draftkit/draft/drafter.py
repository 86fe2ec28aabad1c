"""The interface of a drafter, and the plain data that crosses it.

Shapes: B batch, T tokens, G = gamma drafted tokens per round, V vocabulary, H hidden size, F = K * H features
of K target layers, A anchors, L draft layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from draftkit.draft.families import STYLES
from draftkit.errors import ConfigError
from draftkit.ops.sampling import Sampling
from draftkit.settings import DrafterSettings, LossSettings

HEADS = ("none", "markov", "gated", "rnn")
LAYOUTS = ("anchor", "one_plus_n")


@dataclass(frozen=True, kw_only=True)
class DrafterShape:
    """What every drafter has. `feature_layers` are target layer OUTPUT indices, ascending; `block_size` sets
    how many tokens are drafted per round; `logit_scale` and `soft_cap` are the target's, on the logits of its
    head. `style` is a row of `draft/families.py`; with `shared_key_value` a layer's values are its key
    projection; rotary embeddings turn `rotary_share` of the head size. `draft_vocab_size`: only so many
    tokens can be drafted; null is the target's vocabulary. `rope_scaling`: how rotary frequencies are scaled
    for long contexts (`draft/rotary.py`); null: they are not. `attention_bias`: the projections of attentions
    have biases."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    feature_layers: tuple[int, ...]
    num_target_layers: int
    block_size: int = DrafterSettings.block_size
    rms_eps: float = 1e-6
    rope_theta: float = 10_000.0
    logit_scale: float = 1.0
    soft_cap: float | None = None
    max_length: int = 4096
    style: str = "qwen3"
    shared_key_value: bool = False
    rotary_share: float = 1.0
    draft_vocab_size: int | None = None
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    # engines disagree on what the target's last layer gives, but for families whose own drafters read it
    reads_last_layer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"drafter.{name}: {getattr(self, name)} must be 1 or more")
        layers = list(self.feature_layers)
        last = self.num_target_layers - (1 if self.reads_last_layer else 2)  # as a target gives them
        if layers != sorted(set(layers)) or any(not 0 <= i <= last for i in layers):
            raise ConfigError(
                f"drafter.feature_layers: {layers} must be ascending and distinct, from 0 to {last}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"drafter.num_heads: {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.gamma < 1:
            raise ConfigError(f"drafter.block_size: {self.block_size} leaves no token to draft")
        if self.draft_vocab_size is not None and not 1 < self.draft_vocab_size <= self.vocab_size:
            raise ConfigError(
                f"drafter.draft_vocab_size: {self.draft_vocab_size} must lie between 2 and the target's "
                f"{self.vocab_size}"
            )
        if self.style not in STYLES:
            raise ConfigError(
                f"drafter.style: {self.style!r} is not known, choose one of {', '.join(STYLES)}"
            )

    @property
    def gamma(self) -> int:
        """Drafted tokens per round."""
        return self.block_size

    @property
    def head_size(self) -> int:
        """Tokens that can be drafted."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def algorithm(self) -> str:
        """Its name in the table of algorithms (`draft/algorithms.py`)."""
        raise NotImplementedError

    @property
    def has_confidence(self) -> bool:
        """Whether a head says how likely each drafted token is to be accepted."""
        return False

    @property
    def only_run(self) -> str | None:
        """What it has that draftkit runs as others made it, and neither trains nor writes; None: nothing."""
        return "attention biases" if self.attention_bias else None

    @property
    def numbers_per_token(self) -> int:
        """Numbers that the drafter keeps for each token of a request: keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class DrafterConfig(DrafterShape):
    """The shape of a block drafter (DSpark, or DFlash with `head="none"` and no confidence head).

    `block_size` is the number of block positions; `layout` "anchor" drafts from every one of them (the anchor
    first), "one_plus_n" (z-lab's DFlash) from all but the anchor. `window` limits the context to the last so
    many positions before the anchor. `layer_attention` gives each layer a sliding window (positions that are
    nearer than it are seen; None: all are) and whether it is causal; null: all see everything.
    """

    mask_token_id: int
    layout: str = DrafterSettings.layout
    head: str = DrafterSettings.head
    markov_rank: int
    confidence: bool = True
    confidence_with_markov: bool = DrafterSettings.confidence_with_markov
    confidence_stop_gradient: bool = DrafterSettings.confidence_stop_gradient
    layer_attention: tuple[tuple[int | None, bool], ...] | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_token_id < self.vocab_size:
            last = self.vocab_size - 1
            raise ConfigError(
                f"drafter.mask_token_id: {self.mask_token_id} must lie between 0 and the target's {last}"
            )
        if self.head not in HEADS:
            raise ConfigError(f"drafter.head: {self.head!r} is not known, choose one of {', '.join(HEADS)}")
        if self.draft_vocab_size is not None and self.style == "gemma4":
            raise ConfigError(
                "drafter.draft_vocab_size: no engine loads a gemma4 block drafter of a reduced "
                "vocabulary; leave it out"
            )
        if self.layout not in LAYOUTS:
            raise ConfigError(
                f"drafter.layout: {self.layout!r} is not known, choose one of {', '.join(LAYOUTS)}"
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(
                f"drafter.window: {self.window} leaves no context, give 1 or more, or null for all of it"
            )

    @property
    def only_run(self) -> str | None:
        """As `DrafterShape.only_run`."""
        return super().only_run or (
            "layers with sliding windows or causal ones" if self.layer_attention else None
        )

    @property
    def gamma(self) -> int:
        """Drafted tokens per round."""
        return self.block_size if self.layout == "anchor" else self.block_size - 1

    @property
    def algorithm(self) -> str:
        """The field's name for this combination."""
        return "dflash" if self.head == "none" and not self.confidence else "dspark"

    @property
    def has_confidence(self) -> bool:
        """Whether a head says how likely each drafted token is to be accepted."""
        return self.confidence


@dataclass(frozen=True)
class Proposal:
    """What a drafter offers in one round: int64 [B, G], the very probabilities it drew from [B, G, V], the
    estimated probability that each token is accepted given those before, [B, G] or None, and the largest
    probability of its own softmax (temperature 1) before each token was drawn, [B, G], None where it was not
    asked for."""

    tokens_BG: Tensor
    probs_BGV: Tensor
    confidence_BG: Tensor | None
    largest_BG: Tensor | None = None


class DraftContext(Protocol):
    """A drafter's memory of what the target has read."""

    @property
    def length(self) -> int:
        """Committed tokens held; the next anchor sits at this absolute position."""
        ...

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


@dataclass(frozen=True)
class TrainBatch:
    """Rows that hold one or more whole conversations ("documents") end to end, with chosen anchors.

    Features and last hidden states at a place come from the target after it has read its document up to
    there. A block sees its own document only, up to its anchor. A drafted token counts where `loss_mask_BT`
    holds at its place; a block ends with the first one that does not count, or that belongs to another
    document. Anchors are places in the row; every tensor has one entry per row.
    """

    tokens_BT: Tensor  # int64
    loss_mask_BT: Tensor  # bool
    features_BTF: Tensor
    last_hidden_BTH: Tensor
    document_BT: Tensor  # int64: number of the token's document within its row, 0, 1, ...; -1 is padding
    positions_BT: Tensor  # int64: position within the document; 0 on padding
    anchors_BA: Tensor  # int64
    anchor_mask_BA: Tensor  # bool: a real anchor, not padding
    domain_BA: Tensor  # int64: index into `domains`; 0 on padding
    domains: tuple[str, ...]  # names, the same for all rows


@dataclass(frozen=True)
class LossReport:
    """Numerators and denominators, to be summed over micro-batches and processes before dividing.

    `loss_sum / weight_sum` is the objective; `sums` holds further numerators over `weight_sum` for the log.
    Per row n = one drafted position that counts: `accept_N` in [0, 1] is the analytic acceptance rate 1 - 1/2
    |q - p|_1, NaN where the target is not known.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    sums: dict[str, Tensor]
    accept_N: Tensor
    rows_N: Tensor  # int64: index into the flattened [B, A, G] grid


class Drafter(nn.Module):
    """What the loop, the trainer and the engine ask of a drafter. Embedding and head are the target's,
    frozen."""

    config: DrafterShape
    embed_tokens: nn.Embedding
    lm_head: nn.Linear
    draft_ids_W: Tensor | None  # target ids of a reduced draft vocabulary

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False  # activations on the way back, instead of keeping them
        self.register_buffer("draft_ids_W", None, persistent=False)

    @property
    def gamma(self) -> int:
        """Drafted tokens per round."""
        return self.config.gamma

    @property
    def has_confidence(self) -> bool:
        """Whether a head says how likely each drafted token is to be accepted."""
        return self.config.has_confidence

    def choose_vocabulary(self, draft_ids_W: Tensor | None, target_head_VH: Tensor | None) -> None:
        """Set the target ids of a reduced draft vocabulary, int64 [W], and the target's whole head to train
        with.

        Raises ConfigError when this drafter has the target's own vocabulary.
        """
        if draft_ids_W is not None:
            raise ConfigError(
                f"drafter.draft_vocab_size: {self.config.algorithm} drafts from the target's whole vocabulary"
            )

    def new_context(self, batch: int = 1) -> DraftContext:
        """An empty context for `batch` requests of equal length."""
        raise NotImplementedError

    def extend(self, context: DraftContext, features_BTF: Tensor, next_tokens_BT: Tensor) -> None:
        """Add T committed positions; `next_tokens_BT[t]` is the token after position t (EAGLE-3 pairs
        them)."""
        raise NotImplementedError

    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        """Draft G tokens after the anchor, which sits at position `context.length`; uniforms are in [0,
        1)."""
        raise NotImplementedError

    def needs_target(self, settings: LossSettings) -> bool:
        """Whether the loss compares with the target's distribution; without, it takes batches whose last
        hidden states are [B, T, 0]."""
        return True

    def loss(self, batch: TrainBatch, settings: LossSettings) -> LossReport:
        """The training objective over all anchors of a batch."""
        raise NotImplementedError

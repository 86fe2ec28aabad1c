"""A block drafter over flattened tokens and paged memory: the same proposals as `BlockDrafter.propose`, for
many requests.

The drafter's keys and values live in the slots of the target's blocks, in a memory of their own. A block in
work writes its positions after the committed ones; the next `extend` or `draft` of the request overwrites
them.

Shapes: R requests, T tokens, P block positions, G = gamma drafted tokens, F = K * H features, H hidden, V
vocabulary, L layers, M key/value heads, D head size, r Markov rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.draft.backbone import DraftLayer
from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import DrafterShape
from draftkit.draft.families import STYLES
from draftkit.draft.rotary import rotary_frequencies
from draftkit.engine.drawing import Drafts, Drawing
from draftkit.engine.graphs import Outputs, Record, RecordedPasses
from draftkit.engine.native import Ends, NativeContext, NativeStack
from draftkit.engine.native_head import NativeHead
from draftkit.engine.paged_model import fuse_layer
from draftkit.engine.passes import PagedPass, Pass
from draftkit.engine.stack import (
    AttentionShape,
    Indices,
    Layer,
    Stack,
    StackShape,
    pair_rows,
    rotary_table,
)
from draftkit.ops.sampling import largest_prob

Choose = Callable[[Tensor, int], Tensor]  # logits [R, V], draft index 0..G-1 -> tokens [R]


@dataclass(frozen=True)
class DraftingPass:
    """What a drafter reads to make its proposals: tokens [R, P] per request, where the first lies, counted
    from the anchor's position, and whether they see each other in both directions."""

    tokens_RP: np.ndarray
    first: int
    block: bool


class PagedBlockDrafter:
    """Weights taken from a loaded `BlockDrafter` (layer matrices are fused copies; embedding and heads are
    shared).

    `slots` positions of memory (blocks * block size, as the target's pool has them); `max_length` is the
    longest request in tokens, the block after it not counted. Raises ConfigError for a drafter that this
    stack cannot run.
    """

    looks_ahead = False  # `extend` needs no tokens

    def __init__(self, drafter: BlockDrafter, slots: int, max_length: int) -> None:
        config = drafter.config
        style = STYLES[config.style]
        self.config, self.gamma = config, config.gamma
        self.embedding, self.head = drafter.embed_tokens.weight, drafter.head()
        scale = torch.tensor(config.hidden_size**0.5, dtype=self.embedding.dtype)
        self.embedding_scale = float(scale) if style.scaled_embedding else 1.0
        self.norm: Tensor = drafter.norm.weight
        self.fc: Tensor = drafter.fc.weight
        self.hidden_norm: Tensor = drafter.hidden_norm.weight
        self.markov, self.confidence = drafter.markov_head, drafter.confidence_head
        self.draft_ids_W, self._over_target = drafter.draft_ids_W, drafter.over_target
        rotary = rotary_of(config, max_length, self.norm)
        blocks = cast(list[DraftLayer], list(drafter.layers))
        layers = tuple(fuse_draft_layer(block, config, rotary, config.window) for block in blocks)
        shape = StackShape(config.hidden_size, config.rms_eps, style.activation == "gelu_pytorch_tanh")
        self.stack = Stack(shape, layers, slots)
        attentions = [block.self_attn for block in blocks]
        keys = [pair_rows(a.k_proj.weight, config.head_dim) for a in attentions]
        # [2 L M D, H]
        self.context_kv = torch.cat([*keys, *(a.value_weight for a in attentions)])
        norms = [pair_rows(a.k_norm.weight, config.head_dim) for a in attentions if a.k_norm is not None]
        self.k_norm = torch.stack(norms) if norms else None  # [L, D]
        # one of them is set when it is ready, see compiled.py
        self.native: NativeDrafter | None = None
        self.recorded: RecordedDrafter | None = None

    @property
    def ends(self) -> Ends:
        """What lies before and after the layers."""
        head = self.head
        return Ends(
            self.embedding, self.embedding_scale, self.norm, head.weight_VH, head.scale, head.soft_cap
        )

    def drop_copies(self) -> None:
        """Give the fused matrices back once compiled passes, which have their own, are in use."""
        if self.native is not None:
            self.stack.drop_weights()
            self.context_kv, self.fc = self.context_kv.new_empty(0), self.fc.new_empty(0)
            self.head = replace(self.head, weight_VH=self.head.weight_VH.new_empty(0))

    @torch.inference_mode()
    def extend(self, step: Pass, features_TF: Tensor, next_tokens_T: Tensor | None) -> None:
        """Write the context's keys and values of the pass's positions, all layers; `next_tokens_T` are not
        needed.

        The pass may be the one that the target has just read, rejected tokens included: what lies after the
        committed positions is overwritten before anything looks at it.
        """
        if self.native is not None:
            self.native.stack.write_context(self.native.context, step, features_TF)
        elif self.recorded is None or self.recorded.context.run(step, features_TF) is None:
            self.write_context(self.stack.laid(step), features_TF)

    def write_context(self, step: Indices, features_TF: Tensor) -> None:
        """`extend` in PyTorch operations."""
        config = self.config
        projected = F.linear(features_TF.to(self.fc.dtype), self.fc)
        hidden = F.rms_norm(projected, (config.hidden_size,), self.hidden_norm, config.rms_eps)
        kv = F.linear(hidden, self.context_kv).view(len(step), 2, config.num_layers, -1, config.head_dim)
        keys, values = kv.permute(1, 2, 0, 3, 4)  # each [L, T, M, D]
        size = (config.head_dim,)
        if self.k_norm is not None:
            keys = F.rms_norm(keys, size, None, config.rms_eps) * self.k_norm[:, None, None]
        if STYLES[config.style].value_norm:
            values = F.rms_norm(values, size, None, config.rms_eps)
        self.stack.write(step, keys, values)

    def drafting_pass(self, anchors_R: np.ndarray) -> DraftingPass:
        """The anchors with `block_size` - 1 mask tokens each, in both directions."""
        tokens_RP = np.full((len(anchors_R), self.config.block_size), self.config.mask_token_id)
        tokens_RP[:, 0] = anchors_R
        return DraftingPass(tokens_RP, 0, block=True)

    @torch.inference_mode()
    def draft(self, step: Pass, anchors_R: Tensor, drawing: Drawing | None) -> Drafts:
        """Propose for every request.

        `step` is the `drafting_pass`, with the anchor at the first position that `extend` has not written.
        `drawing` None drafts greedily.
        """
        if (
            drawing is None
            and self.recorded is not None
            and (played := self.recorded.greedy.run(step)) is not None
        ):
            tokens_RG, said_RG = played
            return Drafts(
                tokens_RG, None, *((said_RG, None) if self.confidence is not None else (None, said_RG))
            )
        hidden_RGH, base_RGV = self.read_block(step)
        if self.native is not None:
            return self.native.head.draft(hidden_RGH, base_RGV, anchors_R, drawing)
        tokens_RG, *said = self._walk(hidden_RGH, base_RGV, anchors_R, drawing or take_largest)
        return Drafts(tokens_RG, drawing.drawn() if drawing is not None else None, *said)

    def greedy(self, step: Indices) -> tuple[Tensor, Tensor]:
        """Tokens of a greedy `draft` [R, G], and confidences or largest probabilities [R, G], in PyTorch
        operations."""
        tokens_RG, *said = self._walk(
            *self._drafting(*self.forward(step)), step.tokens[:: self.config.block_size], take_largest
        )
        return tokens_RG, next(said_RG for said_RG in said if said_RG is not None)

    def _walk(
        self, hidden_RGH: Tensor, base_RGV: Tensor, anchors_R: Tensor, choose: Choose
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Along the head, after what the block gave: tokens, and confidences or largest probabilities."""
        previous_R, state = anchors_R, None
        tokens, largest, embedded = [], [], []
        for k in range(self.gamma):
            logits_RV = base_RGV[:, k]
            if self.markov is not None:
                embedded.append(self.markov.previous(previous_R))
                row_Rr, state = self.markov.step(hidden_RGH[:, k], embedded[-1], state)
                logits_RV = torch.addmm(logits_RV, row_Rr, self.markov.markov_w2.weight.t())
            logits_RV = self._over_target(logits_RV)
            if self.confidence is None:
                largest.append(largest_prob(logits_RV))
            previous_R = choose(logits_RV, k)
            tokens.append(previous_R)
        confidence = None
        if self.confidence is not None:
            markov = torch.stack(embedded, 1) if embedded else None
            confidence = torch.sigmoid(self.confidence(hidden_RGH, markov).float())
        return torch.stack(tokens, 1), confidence, torch.stack(largest, 1) if largest else None

    def read_block(self, step: Pass) -> tuple[Tensor, Tensor]:
        """Normed hidden states and base logits of the drafting positions, [R, G, H] and [R, G, V]."""
        size, gamma = self.config.block_size, self.gamma
        if self.native is not None:
            rows_RG = np.arange(len(step)).reshape(-1, size)[:, size - gamma :]
            base, hidden, _ = self.native.stack.run(step, rows_RG.ravel())
            return hidden.view(-1, gamma, hidden.shape[1]), base.view(-1, gamma, base.shape[1])
        played = self.recorded.block.run(step) if self.recorded is not None else None
        hidden_TH, base_TV = self.forward(self.stack.laid(step)) if played is None else played
        return self._drafting(hidden_TH, base_TV)

    def _drafting(self, hidden_TH: Tensor, base_TV: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.block_size
        hidden_RPH, base_RPV = (t.unflatten(0, (-1, size)) for t in (hidden_TH, base_TV))
        return hidden_RPH[:, size - self.gamma :], base_RPV[:, size - self.gamma :]

    def forward(self, step: Indices) -> tuple[Tensor, Tensor]:
        """Normed hidden states [T, H] and base logits [T, V] of whole blocks in PyTorch operations."""
        x_TH = F.embedding(step.tokens, self.embedding)
        if self.embedding_scale != 1:
            x_TH = x_TH * self.embedding_scale
        x_TH, _ = self.stack.run(x_TH, step)
        hidden_TH = F.rms_norm(x_TH, self.norm.shape, self.norm, self.config.rms_eps)
        return hidden_TH, self.head.logits(hidden_TH)


def take_largest(logits_RV: Tensor, _: int) -> Tensor:
    """The greedy `Choose`: tokens [R]."""
    return logits_RV.argmax(-1)


class RecordedDrafter:
    """Recordings of a drafter's passes: over its blocks, those and the greedy way along the head, and from
    features to keys and values."""

    def __init__(self, drafter: PagedBlockDrafter, widest: int, record: Record) -> None:
        slots, size, features = drafter.stack.slots, drafter.config.block_size, drafter.fc.shape[1]
        drafter = weakref.proxy(drafter)  # see `record_passes`

        def write_context(step: PagedPass, features_TF: Tensor | None) -> Outputs:
            if features_TF is not None:
                drafter.write_context(step, features_TF)
            return ()

        self.block = RecordedPasses(lambda step, _: drafter.forward(step), slots, widest, record, size)
        self.greedy = RecordedPasses(lambda step, _: drafter.greedy(step), slots, widest, record, size)
        self.context = RecordedPasses(write_context, slots, widest, record, features=features)


class NativeDrafter:
    """The C++ passes of a drafter: over its blocks, from features to keys and values, and along the head.
    `target` has packed the head, where it is the very same tensor. Raises NoNative."""

    def __init__(self, drafter: PagedBlockDrafter, stack: Stack, target: NativeStack | None) -> None:
        self.stack = NativeStack(stack, drafter.ends, target)
        self.context = NativeContext(
            self.stack, drafter.fc, drafter.hidden_norm, drafter.context_kv, drafter.k_norm
        )
        self.head = NativeHead(self.stack, drafter.markov, drafter.confidence, drafter.draft_ids_W)


def rotary_of(config: DrafterShape, max_length: int, like: Tensor) -> Tensor:
    """The drafter's rotary table (see `rotary_table`) for requests of `max_length` tokens and what is drafted
    after."""
    frequencies, factor = rotary_frequencies(config)
    return rotary_table(max_length + config.block_size, frequencies, factor, like.dtype).to(like.device)


def fuse_draft_layer(layer: DraftLayer, config: DrafterShape, rotary: Tensor, window: int | None) -> Layer:
    """A drafter's layer as the stack wants it."""
    module = layer.self_attn
    attention = AttentionShape(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=module.scale,
        window=window,
        value_norm=module.value_norm,
    )
    return fuse_layer(layer, attention, rotary, layer.output_norms, lambda norm: cast(Tensor, norm.weight))

"""An EAGLE-3 drafter over flattened tokens and paged memory: the proposals of `EagleDrafter.propose`, for
many requests.

Row i of a request (feature i with token i + 1) lies at position i of the target's blocks: keys, values and
the projected feature. The last committed row is made again when drafting starts from it, with the anchor as
its token; drafted rows lie after it, until the next `extend` overwrites them. A row needs the token after it,
so the last row of a block depends on the block that follows: a prefix that others have read cannot be taken
over.

Shapes: R requests, T tokens, G = gamma drafted tokens, F = K * H features, H hidden, V vocabulary, N query
heads, M key/value heads, D head size.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.draft.backbone import embed
from draftkit.draft.eagle3 import EagleDrafter
from draftkit.draft.families import STYLES
from draftkit.engine.drawing import Drafts, Drawing
from draftkit.engine.paged_drafter import DraftingPass, fuse_draft_layer, rotary_of, take_largest
from draftkit.engine.passes import Pass
from draftkit.engine.stack import Stack, StackShape
from draftkit.ops.sampling import largest_prob


class PagedEagle:
    """Weights of a loaded `EagleDrafter` (layer matrices are fused copies); `slots`, `max_length` as in
    `PagedBlockDrafter`."""

    looks_ahead = True  # `extend` needs the token after each position

    def __init__(self, drafter: EagleDrafter, slots: int, max_length: int) -> None:
        config = drafter.config
        self.config, self.gamma, self._drafter = config, config.gamma, drafter
        rotary = rotary_of(config, max_length, drafter.norm.weight)
        self._layer = fuse_draft_layer(drafter.midlayer, config, rotary, None)
        shape = StackShape(
            config.hidden_size, config.rms_eps, STYLES[config.style].activation == "gelu_pytorch_tanh"
        )
        self.stack = Stack(shape, (self._layer,), slots)
        self._states = drafter.norm.weight.new_zeros(slots + 1, config.hidden_size)

    @torch.inference_mode()
    def extend(self, step: Pass, features_TF: Tensor, next_tokens_T: Tensor | None) -> None:
        """Write the rows of the pass's positions: features [T, F], each with the token after it. Rows of
        rejected tokens may be among them; they are overwritten before anything looks at them. Raises
        ValueError without tokens."""
        if next_tokens_T is None:
            raise ValueError("rows of EAGLE-3 hold the token after each position")
        drafter, config = self._drafter, self.config
        states_TH = drafter.project(features_TF)
        u, _ = drafter.midlayer.join(embed(drafter.embed_tokens, next_tokens_T, config), states_TH)
        kv = F.linear(u, self._layer.qkv[config.num_heads * config.head_dim :])
        keys, values = kv.view(len(step), 2, -1, config.head_dim).unbind(1)
        size = (config.head_dim,)
        if self._layer.qk_norm is not None:
            keys = F.rms_norm(keys, size, None, config.rms_eps) * self._layer.qk_norm[config.num_heads :]
        if self._layer.attention.value_norm:
            values = F.rms_norm(values, size, None, config.rms_eps)
        self.stack.write(step, keys[None], values[None])
        self._states[step.slots] = states_TH

    def drafting_pass(self, anchors_R: np.ndarray) -> DraftingPass:
        """Room for G rows per request, the first before the anchor's position; the tokens come one after the
        other."""
        return DraftingPass(np.repeat(anchors_R[:, None], self.gamma, 1), -1, block=False)

    @torch.inference_mode()
    def draft(self, step: Pass, anchors_R: Tensor, drawing: Drawing | None) -> Drafts:
        """G passes of one token per request, without confidences; `drawing` None drafts greedily.

        `step` is the `drafting_pass`: where the rows lie; their token ids do not matter.
        """
        drafter, choose = self._drafter, drawing or take_largest
        state_RH, token_R = self._states[step.slots[:: self.gamma]], anchors_R
        tokens, largest = [], []
        for k in range(self.gamma):
            u, residual_RH = drafter.midlayer.join(
                embed(drafter.embed_tokens, token_R, self.config), state_RH
            )
            single = self.stack.laid(self._single(step, k))
            state_RH = self.stack.finish_layer(0, residual_RH, F.linear(u, self._layer.qkv), {}, single)
            logits_RV = drafter.logits(state_RH)
            state_RH = drafter.fed_back(state_RH)
            largest.append(largest_prob(logits_RV))
            token_R = choose(logits_RV, k)
            tokens.append(token_R)
        drawn = drawing.drawn() if drawing is not None else None
        return Drafts(torch.stack(tokens, 1), drawn, None, torch.stack(largest, 1))

    def _single(self, step: Pass, k: int) -> Pass:
        """The k-th token of every request."""
        ones_R = np.ones_like(step.starts_R)
        tokens_R = np.zeros_like(step.starts_R)
        return Pass(
            tokens_R, step.starts_R + k, ones_R, step.tables_RB, step.block_size, step.device, step.dtype
        )

"""A block drafter over flattened tokens and paged memory: the same proposals as `BlockDrafter.propose`, for many requests.

The drafter's keys and values live in the slots of the target's blocks, in a memory of their own. A block in work writes
its positions behind the committed ones; the next `extend` or `draft` of the request overwrites them.

Shapes: R requests, T tokens, P block positions, G = gamma drafted tokens, F = K * H features, H hidden, V vocabulary,
L layers, M key/value heads, D head size, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.draft.backbone import DraftLayer
from draftkit.draft.block import BlockDrafter
from draftkit.engine.fast_model import fuse_layer
from draftkit.engine.passes import Pass
from draftkit.engine.stack import Stack, StackShape, pair_rows, rotary_table
from draftkit.errors import ConfigError

Choose = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # logits [R, V], draft index 0..G-1 -> tokens [R], probs [R, V]


class FastDrafter:
    """Weights taken from a loaded `BlockDrafter` (layer matrices are fused copies; embedding and heads are shared).

    `slots` positions of memory (blocks * block size, as the target's pool has them); `max_length` is the longest
    request in tokens, the block behind it not counted. Raises ConfigError for a drafter that this stack cannot run.
    """

    def __init__(self, drafter: BlockDrafter, slots: int, max_length: int) -> None:
        config = drafter.config
        if config.style != "qwen3" or config.window or config.soft_cap or config.logit_scale != 1:
            raise ConfigError("the engine runs drafters of Qwen3 blocks over the whole context, without soft cap or scale")
        self.config, self.gamma = config, config.gamma
        self.embedding = drafter.embed_tokens.weight
        self.head, self.norm = drafter.lm_head.weight, drafter.norm.weight
        self.markov, self.confidence = drafter.markov_head, drafter.confidence_head
        self.fc, self.hidden_norm = drafter.fc.weight, drafter.hidden_norm.weight
        shape = StackShape(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate_size,
            eps=config.rms_eps,
        )
        blocks = cast(list[DraftLayer], list(drafter.layers))
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        rotary = rotary_table(max_length + config.block_size, frequencies, 1.0, self.head.dtype).to(self.head.device)
        self.stack = Stack(shape, tuple(fuse_layer(block, shape) for block in blocks), rotary, slots)
        keys = [pair_rows(b.self_attn.k_proj.weight, config.head_dim) for b in blocks]
        self.context_kv = torch.cat([*keys, *(b.self_attn.value_weight for b in blocks)])  # [2 L M D, H]
        norms = [b.self_attn.k_norm.weight for b in blocks if b.self_attn.k_norm is not None]
        self.k_norm = torch.stack([pair_rows(weight, config.head_dim) for weight in norms])[:, None, None]

    @torch.inference_mode()
    def extend(self, step: Pass, features_TF: Tensor, next_tokens_T: Tensor) -> None:
        """Write the context's keys and values of the pass's positions, all layers; `next_tokens_T` are not needed.

        The pass may be the one that the target has just read, rejected tokens included: what lies behind the committed
        positions is overwritten before anything looks at it.
        """
        config = self.config
        projected = F.linear(features_TF.to(self.fc.dtype), self.fc)
        hidden = F.rms_norm(projected, (config.hidden_size,), self.hidden_norm, config.rms_eps)
        kv = F.linear(hidden, self.context_kv).view(len(step), 2, config.num_layers, -1, config.head_dim)
        keys, values = kv.permute(1, 2, 0, 3, 4)  # each [L, T, M, D]
        keys = F.rms_norm(keys, (config.head_dim,), None, config.rms_eps) * self.k_norm
        self.stack.write(step, keys, values)

    @torch.inference_mode()
    def draft(self, step: Pass, anchors_R: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor | None]:
        """Propose for every request: tokens [R, G], the probabilities that `choose` returned [R, G, V], and the
        confidences in (0, 1) [R, G] or None.

        `step` is a pass with `block=True` that holds, per request, the anchor and `block_size` - 1 mask tokens, the anchor
        at the first position that `extend` has not written. `choose` gets the logits of one position of every block, in
        order from left to right, and returns the tokens with the distribution they were drawn from.
        """
        hidden_RGH = self._block_hidden(step)
        base_RGV = F.linear(hidden_RGH, self.head)
        previous_R, state = anchors_R, None
        tokens, probs, embedded = [], [], []
        for k in range(self.gamma):
            logits_RV = base_RGV[:, k]
            if self.markov is not None:
                embedded.append(self.markov.previous(previous_R))
                row_Rr, state = self.markov.step(hidden_RGH[:, k], embedded[-1], state)
                logits_RV = torch.addmm(logits_RV, row_Rr, self.markov.markov_w2.weight.t())
            previous_R, probs_RV = choose(logits_RV, k)
            tokens.append(previous_R)
            probs.append(probs_RV)
        confidence = None
        if self.confidence is not None:
            markov = torch.stack(embedded, 1) if embedded else None
            confidence = torch.sigmoid(self.confidence(hidden_RGH, markov).float())
        return torch.stack(tokens, 1), torch.stack(probs, 1), confidence

    def _block_hidden(self, step: Pass) -> Tensor:
        """Normed hidden states of the G drafting positions, [R, G, H]."""
        size = self.config.block_size
        x_TH, _ = self.stack.run(F.embedding(step.tokens, self.embedding), step)
        drafting = x_TH.view(-1, size, self.config.hidden_size)[:, size - self.gamma :]
        return F.rms_norm(drafting, self.norm.shape, self.norm, self.config.rms_eps)

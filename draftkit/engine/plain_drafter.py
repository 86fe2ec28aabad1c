"""Drafters without a paged form: `Drafter.propose`, one request after the other, after the interface of the
paged ones.

A proposal is drawn as the request's sampling settings say, and verified against the very probabilities that
it was drawn from. Where something else changes the request's logits (a grammar, penalties) it is what the
drafter finds most likely: that was drawn with certainty.

Shapes: R requests, T tokens, G = gamma drafted tokens, F = K * H features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from draftkit.draft.drafter import DraftContext, Drafter, Proposal
from draftkit.engine.drawing import Drafts, Drawing, Drawn
from draftkit.engine.paged_drafter import DraftingPass
from draftkit.engine.passes import Pass
from draftkit.ops.native_sampling import SETTING
from draftkit.ops.sampling import DenseRows, Sampling


class PlainDrafter:
    """Keeps one context per request, found by the request's first block: prefixes must not be shared."""

    looks_ahead = True  # `extend` gives the drafter the token after each position

    def __init__(self, drafter: Drafter) -> None:
        self.config, self.gamma, self._drafter = drafter.config, drafter.gamma, drafter
        self._contexts: dict[int, DraftContext] = {}

    @torch.inference_mode()
    def extend(self, step: Pass, features_TF: Tensor, next_tokens_T: Tensor | None) -> None:
        """Read the pass's features [T, F]; what is read of rejected tokens is cut off before it is used."""
        if next_tokens_T is None:
            raise ValueError("a drafter reads each position with the token after it")
        for row, (first, end) in enumerate(zip(step.firsts_R, step.ends_R, strict=True)):
            context = self._context(step, row)
            self._drafter.extend(context, features_TF[None, first:end], next_tokens_T[None, first:end])

    def drafting_pass(self, anchors_R: np.ndarray) -> DraftingPass:
        """The anchors alone: they say which requests draft, and from where."""
        return DraftingPass(anchors_R[:, None], 0, block=False)

    @torch.inference_mode()
    def draft(self, step: Pass, anchors_R: Tensor, drawing: Drawing | None) -> Drafts:
        """Proposals after every request's anchor; `drawing` None drafts greedily."""
        proposals = [self._proposal(step, anchors_R, row, drawing) for row in range(len(anchors_R))]
        drawn = None
        if drawing is not None and not drawing.greedy:
            drawn = Drawn(DenseRows(torch.cat([p.probs_BGV for p in proposals]).flatten(0, 1)), None)
        tokens_RG = torch.cat([p.tokens_BG for p in proposals])
        confidence = [p.confidence_BG for p in proposals if p.confidence_BG is not None]
        largest = [p.largest_BG for p in proposals if p.largest_BG is not None]
        return Drafts(
            tokens_RG,
            drawn,
            torch.cat(confidence) if len(confidence) == len(proposals) else None,
            torch.cat(largest) if len(largest) == len(proposals) and not confidence else None,
        )

    def _proposal(self, step: Pass, anchors_R: Tensor, row: int, drawing: Drawing | None) -> Proposal:
        sampling, uniforms_1G = Sampling(0.0), np.zeros((1, self.gamma))
        if drawing is not None and not drawing.adjusts_row(row):
            setting, uniforms_1G = drawing.settings_D[row], drawing.uniforms_DG[row : row + 1]
            sampling = Sampling(**{name: setting[name].item() for name in SETTING.names or ()})
        context, anchor_1 = self._context(step, row), anchors_R[row : row + 1]
        return self._drafter.propose(
            context, anchor_1, sampling, torch.from_numpy(uniforms_1G).to(anchors_R.device)
        )

    def forget(self, block: int) -> None:
        """Drop the context of the request that has this first block."""
        self._contexts.pop(block, None)

    def _context(self, step: Pass, row: int) -> DraftContext:
        """The request's context, cut to the tokens before the pass."""
        block, length = int(step.tables_RB[row, 0]), int(step.starts_R[row])
        context = self._contexts.get(block)
        if length == 0 or context is None:
            context = self._contexts[block] = self._drafter.new_context()
            if length:  # a pass that is only timed: nothing was read before it
                features = len(self.config.feature_layers) * self.config.hidden_size
                tokens_1T = torch.zeros(1, length, dtype=torch.int64, device=step.device)
                self._drafter.extend(
                    context, torch.zeros(1, length, features, device=step.device, dtype=step.dtype), tokens_1T
                )
        if context.length > length:
            context.crop(length)
        return context

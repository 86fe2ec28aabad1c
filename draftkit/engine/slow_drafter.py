"""Drafters without a paged form (EAGLE-3): each request has a context of its own, and proposes by itself.

Shapes: D requests that draft, T tokens of a pass, G = gamma drafted tokens, V vocabulary, F = K * H features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from draftkit.draft.drafter import DraftContext, Drafter, Proposal
from draftkit.engine.passes import Pass
from draftkit.engine.request import SamplingParams
from draftkit.ops.sampling import Sampling


class SlowDrafter:
    """Keeps one context per request, found by the request's first block: prefixes must not be shared.

    Proposals come from the drafter's own `propose`. Settings beyond temperature, top-k, top-p and min-p do not shape them,
    only what verification accepts.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._contexts: dict[int, DraftContext] = {}

    @torch.inference_mode()
    def extend(self, step: Pass, features_TF: Tensor, next_tokens_T: Tensor) -> None:
        """The contexts take in the pass; what was rejected is cropped when the request comes again."""
        for row, (start, first, end) in enumerate(zip(step.starts_R, step.firsts_R, step.ends_R, strict=True)):
            context = self._context(step, row, int(start))
            self._drafter.extend(context, features_TF[None, first:end], next_tokens_T[None, first:end])

    @torch.inference_mode()
    def draft(
        self, step: Pass, params_D: Sequence[SamplingParams], uniforms_DG: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Proposals behind the anchors that `step` holds, one token per request: tokens [D, G], distributions [D, G, V],
        confidences [D, G] or None, largest probabilities [D, G] (see `Proposal`)."""
        made: list[Proposal] = []
        for row, (start, params) in enumerate(zip(step.starts_R, params_D, strict=True)):
            sampling = Sampling(params.temperature, max(params.top_k, 0), params.top_p, params.min_p)
            uniforms = torch.from_numpy(uniforms_DG[row : row + 1, : self._drafter.gamma]).to(step.device)
            context = self._context(step, row, int(start))
            made.append(self._drafter.propose(context, step.tokens[row : row + 1], sampling, uniforms))
        confidences = [p.confidence_BG for p in made if p.confidence_BG is not None]
        largest = [p.largest_BG for p in made if p.largest_BG is not None]
        tokens_DG, probs_DGV = torch.cat([p.tokens_BG for p in made]), torch.cat([p.probs_BGV for p in made])
        confidence_DG, largest_DG = (torch.cat(parts) if parts else None for parts in (confidences, largest))
        return tokens_DG, probs_DGV, confidence_DG, largest_DG

    def forget(self, block: int) -> None:
        """Drop the context of the request that has this first block."""
        self._contexts.pop(block, None)

    def _context(self, step: Pass, row: int, length: int) -> DraftContext:
        """The request's context, cut to the tokens that were kept."""
        block = int(step.tables_RB[row, 0])
        if length == 0:
            self._contexts[block] = self._drafter.new_context()
        context = self._contexts[block]
        context.crop(length)
        return context

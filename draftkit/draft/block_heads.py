"""What a drafter of blocks does with its hidden states: drafts from left to right with its heads, and learns.

What makes the hidden states is a drafter's own: `block.py`, `deepseek_v4.py`.

Shapes: B batch, G = gamma drafted tokens, V vocabulary, H hidden, r Markov rank; in training X blocks, N rows
that count.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from draftkit.draft.averaging import row_weights
from draftkit.draft.backbone import embed
from draftkit.draft.drafter import DraftContext, DrafterConfig, LossReport, Proposal, TrainBatch
from draftkit.draft.heads import ConfidenceHead, MarkovHead
from draftkit.draft.layout import TrainLayout, lay_out
from draftkit.draft.loss_terms import needs_target
from draftkit.draft.losses import Head, Rows, distillation_loss
from draftkit.draft.vocabulary import ReducedHead
from draftkit.errors import ConfigError
from draftkit.ops.sampling import Sampling, largest_prob, processed_probs, sample
from draftkit.settings import LossSettings


class BlockHeads(ReducedHead):
    """A drafter of blocks without its backbone: embedding and head are the target's, frozen; sequential and
    confidence heads where the shape has them."""

    config: DrafterConfig
    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None

    def _block_hidden(self, context: DraftContext, anchor_B: Tensor) -> Tensor:
        """Hidden states of the G drafting positions after a context, [B, G, H]."""
        raise NotImplementedError

    def _train_hidden(self, batch: TrainBatch, layout: TrainLayout) -> Tensor:
        """Hidden states of all drafting positions of a batch, [X, G, H]."""
        raise NotImplementedError

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the output head reads of the hidden states [..., H], which the confidence head reads as they
        are."""
        return hidden

    def head(self) -> Head:
        """The target's output head, or its rows of the draft vocabulary, with the family's factor and soft
        cap."""
        return Head(self.lm_head.weight, self.config.logit_scale, self.config.soft_cap)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., H]."""
        return embed(self.embed_tokens, tokens, self.config)

    @torch.inference_mode()
    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        """One pass of the backbone over the block, then the head from left to right."""
        hidden_BGH = self._block_hidden(context, anchor_B)
        base_BGV = self.head().logits(self.head_input(hidden_BGH))
        previous_B, state = anchor_B, None
        tokens, probs, largest, embedded = [], [], [], []
        for k in range(self.gamma):
            logits_BV = base_BGV[:, k]
            if self.markov_head is not None:
                markov_Br = self.markov_head.previous(previous_B)
                row_Br, state = self.markov_head.step(hidden_BGH[:, k], markov_Br, state)
                logits_BV = logits_BV + self.markov_head.markov_w2(row_Br)
                embedded.append(markov_Br)
            logits_BV = self.over_target(logits_BV)
            q_BV = processed_probs(logits_BV, sampling)
            previous_B = q_BV.argmax(-1) if sampling.temperature == 0 else sample(q_BV, uniforms_BG[:, k])
            tokens.append(previous_B)
            probs.append(q_BV)
            largest.append(largest_prob(logits_BV))
        confidence = None
        if self.confidence_head is not None:
            markov = torch.stack(embedded, 1) if embedded else None
            confidence = torch.sigmoid(self.confidence_head(hidden_BGH, markov).float())
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1), confidence, torch.stack(largest, 1))

    def needs_target(self, settings: LossSettings) -> bool:
        """See `Drafter`; the confidence head learns the acceptance rate."""
        return needs_target(settings) or (self.confidence_head is not None and settings.confidence > 0)

    def loss(self, batch: TrainBatch, settings: LossSettings) -> LossReport:
        """All terms over all drafted positions that count; nothing is reduced over processes. Raises
        ConfigError for a drafter that is only run."""
        if self.config.only_run:
            raise ConfigError(
                f"the drafter has {self.config.only_run}: draftkit runs it and does not train it"
            )
        layout = lay_out(batch, self.gamma, self.config.window)
        row_N, before_XG, weights = layout.row_N, layout.drafted_XG - 1, row_weights(batch, layout, settings)
        hidden_NH = self._train_hidden(batch, layout).flatten(0, 1)[row_N]
        previous_N = batch.tokens_BT.flatten()[before_XG].flatten()[row_N]
        embedded_Nr, markov_Nr = self._train_markov(hidden_NH, previous_N, layout)
        rows = Rows(
            hidden_NH=self.head_input(hidden_NH),
            head=self.head(),
            markov=(markov_Nr, self.markov_head.markov_w2.weight)
            if self.markov_head and markov_Nr is not None
            else None,
            target_hidden_NH=batch.last_hidden_BTH.flatten(0, 1)[before_XG.flatten()[row_N]].to(
                hidden_NH.dtype
            ),
            place_N=before_XG.flatten()[row_N],
            target_head=replace(self.head(), weight_VH=self.whole_head()),
            tokens_N=self.draft_tokens(batch.tokens_BT.flatten()[layout.drafted_XG.flatten()[row_N]]),
            grid_N=row_N,
            gamma=self.gamma,
            draft_ids_W=self.draft_ids_W,
            scale_N=weights.scale_N,
        )
        losses = distillation_loss(rows, settings)
        weights_N = weights.weights_N.to(losses.ce_N)
        sums = losses.sums(weights_N)
        loss = losses.loss
        if self.confidence_head is not None and losses.compared:
            logits_N = self.confidence_head(hidden_NH, embedded_Nr).to(losses.ce_N)
            bce_N = F.binary_cross_entropy_with_logits(logits_N, losses.accept_N, reduction="none")
            sums["confidence"] = (weights_N @ bce_N).detach()
            loss = loss + settings.confidence * (weights_N @ bce_N)
        return LossReport(loss, weights.total, sums, losses.accept_N, layout.grid_N)

    def _train_markov(
        self, hidden_NH: Tensor, previous_N: Tensor, layout: TrainLayout
    ) -> tuple[Tensor | None, Tensor | None]:
        """W_1[x_{k-1}] and m_k of the rows that count, with the conversation's own tokens as x_{k-1}."""
        if self.markov_head is None:
            return None, None
        embedded_Nr = self.markov_head.previous(previous_N)
        if self.markov_head.kind != "rnn":
            return embedded_Nr, self.markov_head.step(hidden_NH, embedded_Nr, None)[0]
        cells = layout.drafted_XG.numel()
        grids = [
            t.new_zeros(cells, t.shape[1]).index_copy(0, layout.row_N, t) for t in (hidden_NH, embedded_Nr)
        ]
        unrolled = self.markov_head.unroll(*(g.unflatten(0, (-1, self.gamma)) for g in grids))
        return embedded_Nr, unrolled.flatten(0, 1)[layout.row_N].to(hidden_NH.dtype)

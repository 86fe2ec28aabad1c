"""A drafter of a kind that draftkit does not know: the mean of the projected features so far, and nothing
else.

One file and one row of the table (`ROW`) are all that adds it; see `tests/test_algorithms.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftkit.draft.algorithms import Algorithm
from draftkit.draft.checkpoint_fields import Fields, write_sizes
from draftkit.draft.checkpoint_forms import Form
from draftkit.draft.drafter import DraftContext, Drafter, DrafterShape, LossReport, Proposal, TrainBatch
from draftkit.draft.layout import lay_out
from draftkit.draft.loss_terms import position_weights
from draftkit.draft.losses import Head, Rows, distillation_loss
from draftkit.ops.sampling import Sampling, processed_probs, sample
from draftkit.settings import DrafterSettings, LossSettings


@dataclass(frozen=True, kw_only=True)
class AverageShape(DrafterShape):
    @property
    def algorithm(self) -> str:
        return "average"


class AverageContext:
    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    @property
    def length(self) -> int:
        return len(self.rows)

    def crop(self, length: int) -> None:
        del self.rows[length:]


class AverageDrafter(Drafter):
    config: AverageShape

    def __init__(self, config: AverageShape) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.fc = nn.Linear(len(config.feature_layers) * hidden, hidden, bias=False)
        self.steps = nn.Parameter(torch.zeros(config.gamma, hidden))
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def new_context(self, batch: int = 1) -> AverageContext:
        assert batch == 1
        return AverageContext()

    @torch.inference_mode()
    def extend(self, context: DraftContext, features_BTF: Tensor, next_tokens_BT: Tensor) -> None:
        assert isinstance(context, AverageContext)
        context.rows += list(self.fc(features_BTF.to(self.fc.weight.dtype))[0])

    @torch.inference_mode()
    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        assert isinstance(context, AverageContext)
        state_H = torch.stack(context.rows).mean(0) + self.embed_tokens(anchor_B)[0]
        probs_GV = processed_probs(self.lm_head(state_H + self.steps), sampling)
        return Proposal(sample(probs_GV, uniforms_BG[0])[None], probs_GV[None], None)

    def loss(self, batch: TrainBatch, settings: LossSettings) -> LossReport:
        layout = lay_out(batch, self.gamma, None)
        projected_CH = self.fc(batch.features_BTF.flatten(0, 1)[layout.context_C].to(self.fc.weight.dtype))
        sums_CH = torch.cat([projected_CH.new_zeros(1, projected_CH.shape[1]), projected_CH.cumsum(0)])
        counts_X1 = (layout.stop_X - layout.start_X)[:, None]
        mean_XH = (sums_CH[layout.stop_X] - sums_CH[layout.start_X]) / counts_X1.clamp_min(1)
        state_XH = mean_XH + self.embed_tokens(batch.tokens_BT.flatten()[layout.anchor_X])
        row_N, before_XG = layout.row_N, layout.drafted_XG - 1
        head = Head(self.lm_head.weight)
        rows = Rows(
            hidden_NH=(state_XH[:, None] + self.steps).flatten(0, 1)[row_N],
            head=head,
            markov=None,
            target_hidden_NH=batch.last_hidden_BTH.flatten(0, 1)[before_XG.flatten()[row_N]].to(
                self.fc.weight.dtype
            ),
            place_N=before_XG.flatten()[row_N],
            target_head=head,
            tokens_N=batch.tokens_BT.flatten()[layout.drafted_XG.flatten()[row_N]],
            grid_N=row_N,
            gamma=self.gamma,
        )
        losses = distillation_loss(rows, settings)
        weights_N = position_weights(settings, self.gamma).to(losses.ce_N)[row_N % self.gamma]
        sums = {"ce": weights_N @ losses.ce_N, "tv": weights_N @ losses.tv_N}
        return LossReport(losses.loss, weights_N.sum(), sums, losses.accept_N, layout.grid_N)


def _shape(section: DrafterSettings, sizes: Mapping[str, Any], mask_token_id: int) -> AverageShape:
    return AverageShape(**sizes)


def _read(fields: Fields, sizes: dict[str, Any]) -> AverageShape:
    return AverageShape(
        **sizes, feature_layers=fields.wanted_ids("layers"), block_size=fields.get("block_size", int)
    )


def _write(config: AverageShape) -> dict[str, Any]:
    more = {"layers": list(config.feature_layers), "block_size": config.block_size}
    return write_sizes(config, "AverageModel", "qwen3") | more


ROW = Algorithm(
    AverageDrafter, _shape, (Form(("portable",), {"AverageModel": "qwen3"}, _read, _write),), layers=1
)

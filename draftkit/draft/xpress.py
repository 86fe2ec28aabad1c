"""XPress: DFlash with a refiner that corrects the whole block's logits in a few passes. It is read and run,
and neither trained nor written.

Every pass adds to the logits what a narrow network says of a position's hidden state, the block's mean of
them and the token before it, mixed over the positions up to this one; then each position's token is chosen
anew (Jacobi iteration: after k passes the first k tokens stay). When sampling, a position keeps its uniform
number in all passes: given those of the positions before, its token has exactly the probabilities of the
last pass, so verification is exact as for any proposal.

Source: XPressRefinerHead in vLLM 0.33 and speculators 0.9 (arXiv 2608.02438). The token before the anchor is
taken to be the anchor, as in vLLM, which does not keep it.

Shapes: B batch, P block positions, G = gamma drafted tokens, H hidden, r refiner rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftkit.draft.backbone import MLP
from draftkit.draft.block import BlockDrafter
from draftkit.draft.checkpoint_fields import Fields
from draftkit.draft.checkpoint_forms import DFLASH, Form
from draftkit.draft.drafter import DraftContext, DrafterConfig, Proposal
from draftkit.errors import CheckpointError
from draftkit.ops.sampling import Sampling, largest_prob, processed_probs, sample


@dataclass(frozen=True, kw_only=True)
class XpressConfig(DrafterConfig):
    """The shape of an XPress drafter: `refiner_rank` r, `refiner_mlp` numbers inside the refiner's MLP, and
    `refiner_passes` before a proposal is done."""

    refiner_rank: int
    refiner_mlp: int
    refiner_passes: int

    @property
    def algorithm(self) -> str:
        """The field's name for this kind of drafter."""
        return "xpress"

    @property
    def only_run(self) -> str | None:
        """As `DrafterShape.only_run`."""
        return "XPress's refiner"


class Refiner(nn.Module):
    """What is added to the logits of a block, [B, P, V], under the names that published folders give its
    parts. `mixer` [r, P, P] is added to the identity, and only its lower triangle counts."""

    def __init__(self, config: XpressConfig) -> None:
        super().__init__()
        hidden, rank, size = config.hidden_size, config.refiner_rank, config.block_size
        self.w1 = nn.Embedding(config.vocab_size, rank)
        self.down_h = nn.Linear(hidden, rank, bias=False)
        self.down_g = nn.Linear(hidden, rank, bias=False)
        self.in_proj = nn.Linear(3 * rank, rank, bias=False)
        self.mixer = nn.Parameter(torch.zeros(rank, size, size))
        self.mlp = MLP(rank, config.refiner_mlp)
        self.w2 = nn.Linear(rank, config.vocab_size, bias=False)

    def summary(self, hidden_BPH: Tensor) -> Tensor:
        """What stays the same in all passes, [B, P, 2 r]."""
        mean = hidden_BPH.mean(1, keepdim=True).expand_as(hidden_BPH)
        return torch.cat([self.down_h(hidden_BPH), self.down_g(mean)], -1)

    def forward(self, summary: Tensor, previous_BP: Tensor) -> Tensor:
        """The bias of every position, given the token before each."""
        x_BPr = self.in_proj(torch.cat([summary, self.w1(previous_BP)], -1))
        x_BPr = x_BPr + torch.einsum("rkj,bjr->bkr", self.mixer.tril(), x_BPr)
        out: Tensor = self.w2(x_BPr + self.mlp(x_BPr))
        return out


class XpressDrafter(BlockDrafter):
    """A block drafter whose tokens are chosen all together, `refiner_passes` times."""

    config: XpressConfig

    def __init__(self, config: XpressConfig) -> None:
        super().__init__(config)
        self.xpress_head = Refiner(config)

    @torch.inference_mode()
    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        """One pass of the backbone over the block, then the refiner's."""
        hidden_BPH = self._block_states(context, anchor_B)
        first = self.config.block_size - self.gamma  # the anchor's own place drafts nothing in 1 + N
        base_BGV, summary = self.head().logits(hidden_BPH[:, first:]), self.xpress_head.summary(hidden_BPH)
        before_B1 = anchor_B[:, None].expand(-1, first + 1)
        tokens_BG = base_BGV.argmax(-1)
        for _ in range(self.config.refiner_passes):
            previous_BP = torch.cat([before_B1, tokens_BG[:, :-1]], 1)
            logits_BGV = base_BGV + self.xpress_head(summary, previous_BP)[:, first:]
            rows = logits_BGV.flatten(0, 1)
            q = processed_probs(rows, sampling)
            chosen = q.argmax(-1) if sampling.temperature == 0 else sample(q, uniforms_BG.flatten())
            tokens_BG = chosen.view_as(tokens_BG)
        return Proposal(tokens_BG, q.view_as(base_BGV), None, largest_prob(rows).view_as(tokens_BG))


def _read_xpress(fields: Fields, sizes: dict[str, Any]) -> XpressConfig:
    """DFlash's fields, and the refiner's."""
    fields.demand("draft_vocab_size", sizes["vocab_size"])
    base = vars(DFLASH.read(fields, sizes))
    size = fields.get("xpress_block_size", int, base["block_size"])
    if size != base["block_size"]:
        raise CheckpointError(
            f"{fields.where}: block_size is {base['block_size']} and xpress_block_size {size}; they must be "
            "equal"
        )
    anchor = fields.get("sample_from_anchor", bool, False)
    return XpressConfig(
        **base | {"layout": "anchor" if anchor else "one_plus_n"},
        refiner_rank=fields.get("xpress_rank", int, 256),
        refiner_mlp=fields.get("xpress_mlp_hidden", int, 512),
        refiner_passes=fields.get("xpress_num_passes", int, 6),
    )


XPRESS = Form(
    (),
    {"Qwen3XPressModel": "qwen3"},
    _read_xpress,
    lambda config: {},  # under no name: it is read alone
    renamed={
        "xpress_head.mix.L": "xpress_head.mixer",
        "refiner_head.token_embed.": "xpress_head.w1.",  # as the speculators library writes it
        "refiner_head.readout.": "xpress_head.w2.",
        "refiner_head.mix_l": "xpress_head.mixer",
        "refiner_head.mlp_gate.": "xpress_head.mlp.gate_proj.",
        "refiner_head.mlp_up.": "xpress_head.mlp.up_proj.",
        "refiner_head.mlp_down.": "xpress_head.mlp.down_proj.",
        "refiner_head.": "xpress_head.",
    },
    with_target_weights=False,
)

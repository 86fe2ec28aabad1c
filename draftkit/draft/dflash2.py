"""z-lab's DFlash2: DFlash with a short convolution around every attention and MLP of the block, and a
selector that walks through the likeliest tokens of each position. It is read and run, and neither trained nor
written.

The convolution's kernel is a base and a part that follows from the input, one for each group of channels:
    y_t = sum_tap (base_tap + delta_tap(x_t)) x_{t - tap}, within the block.
The selector scores candidate c of a position after token p: logit(c) + (U[p] * W h) . S[c].
Source: DFlash2DraftModel as vLLM 0.32 runs it.

Shapes: B batch, P block positions, G = gamma drafted tokens, K candidates, H hidden, R selector rank, V
vocabulary; taps and groups of channels of a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftkit.draft.backbone import DraftLayer
from draftkit.draft.block import BlockDrafter
from draftkit.draft.drafter import DraftContext, DrafterConfig, Proposal
from draftkit.errors import ConfigError
from draftkit.ops.sampling import Sampling, largest_prob, processed_probs, sample


@dataclass(frozen=True, kw_only=True)
class Dflash2Config(DrafterConfig):
    """The shape of a DFlash2 drafter. `conv_kernel_size` taps, groups of `conv_group_size` channels;
    `selector_top_k` candidates per position, codebooks of rank `selector_rank`."""

    conv_kernel_size: int
    conv_group_size: int
    selector_rank: int
    selector_top_k: int
    input_embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.conv_group_size:
            raise ConfigError(
                f"drafter.conv_group_size: {self.conv_group_size} does not divide hidden_size "
                f"{self.hidden_size}"
            )
        if self.selector_top_k > self.vocab_size:
            raise ConfigError(
                f"drafter.selector_top_k: {self.selector_top_k} is more than the vocabulary {self.vocab_size}"
            )

    @property
    def algorithm(self) -> str:
        """The field's name for this kind of drafter."""
        return "dflash2"

    @property
    def only_run(self) -> str | None:
        """As `DrafterShape.only_run`."""
        return "DFlash2's selector"


class GroupedConv(nn.Module):
    """The convolution before (side 0) and after (side 1) one part of a layer; both kernels follow from what
    goes in."""

    def __init__(self, config: Dflash2Config) -> None:
        super().__init__()
        taps, hidden = config.conv_kernel_size, config.hidden_size
        self.group_size, self.groups = config.conv_group_size, hidden // config.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden))
        self.kernel_projection = nn.Linear(hidden, 2 * taps * self.groups, bias=False)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, P, H] convolved, and the kernel [B, P, taps, groups] for `leave`."""
        delta = self.kernel_projection(x).unflatten(-1, (2, -1, self.groups))
        return self._convolved(x, delta[..., 0, :, :], 0), delta[..., 1, :, :]

    def leave(self, x: Tensor, delta: Tensor) -> Tensor:
        """What came out [B, P, H], convolved."""
        return self._convolved(x, delta, 1)

    def _convolved(self, x_BPH: Tensor, delta: Tensor, side: int) -> Tensor:
        kernel = self.base_kernel[side] + delta.repeat_interleave(self.group_size, -1)  # [B, P, taps, H]
        out = torch.zeros_like(x_BPH)
        for tap in range(kernel.shape[2]):
            earlier = F.pad(x_BPH, (0, 0, tap, 0))[:, : x_BPH.shape[1]]
            out = out + kernel[:, :, tap] * earlier
        return out


class ConvLayer(DraftLayer):
    """A block's layer with a convolution around attention and one around the MLP."""

    def __init__(self, config: Dflash2Config) -> None:
        super().__init__(config)
        self.attention_conv, self.mlp_conv = GroupedConv(config), GroupedConv(config)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `DraftLayer.enter`; the kernel for `leave` is kept."""
        return self.attention_conv.enter(self.input_layernorm(x))

    def leave(self, x: Tensor, attended: Tensor, kept: Tensor | None) -> Tensor:
        """As `DraftLayer.leave`."""
        if kept is None:
            raise ValueError("a layer is left with the kernel that entering it gave")
        x = x + self.attention_conv.leave(self.self_attn.o_proj(attended), kept)
        normed, kernel = self.mlp_conv.enter(self.post_attention_layernorm(x))
        return x + self.mlp_conv.leave(self.mlp(normed), kernel)


class CandidateSelector(nn.Module):
    """Codebooks of tokens as predecessors and successors [V, R], and what a position's hidden state says."""

    def __init__(self, config: Dflash2Config) -> None:
        super().__init__()
        shape = (config.vocab_size, config.selector_rank)
        self.predecessor_codebook, self.successor_codebook = (
            nn.Parameter(torch.zeros(shape)),
            nn.Parameter(torch.zeros(shape)),
        )
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    def scores(self, hidden_BH: Tensor, previous_B: Tensor, ids_BK: Tensor) -> Tensor:
        """What is added to the candidates' logits after the token before them, [B, K]."""
        asked_BR = self.predecessor_codebook[previous_B] * self.hidden_projection(hidden_BH)
        return torch.einsum("br,bkr->bk", asked_BR, self.successor_codebook[ids_BK])


class Dflash2Drafter(BlockDrafter):
    """A block drafter of `ConvLayer`s whose tokens are chosen from left to right among each position's
    candidates; all others have probability 0."""

    config: Dflash2Config

    def __init__(self, config: Dflash2Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ConvLayer(config) for _ in range(config.num_layers))
        self.candidate_selector = CandidateSelector(config)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., H], scaled as the folder says."""
        return super().embed(tokens) * self.config.input_embedding_scale

    @torch.inference_mode()
    def propose(
        self, context: DraftContext, anchor_B: Tensor, sampling: Sampling, uniforms_BG: Tensor
    ) -> Proposal:
        """One pass over the block, then a walk through the candidates."""
        hidden_BGH = self._block_hidden(context, anchor_B)
        base_BGK, ids_BGK = self.head().logits(hidden_BGH).topk(self.config.selector_top_k)
        previous_B, tokens, probs, largest = anchor_B, [], [], []
        for k in range(self.gamma):
            ids_BK = ids_BGK[:, k]
            scores_BK = base_BGK[:, k] + self.candidate_selector.scores(hidden_BGH[:, k], previous_B, ids_BK)
            none_BV = scores_BK.new_full((len(anchor_B), self.config.vocab_size), float("-inf"))
            logits_BV = none_BV.scatter(1, ids_BK, scores_BK)
            q_BV = processed_probs(logits_BV, sampling)
            previous_B = q_BV.argmax(-1) if sampling.temperature == 0 else sample(q_BV, uniforms_BG[:, k])
            tokens.append(previous_B)
            probs.append(q_BV)
            largest.append(largest_prob(logits_BV))
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1), None, torch.stack(largest, 1))

"""The sequential head and the confidence head of DSpark.

All sequential heads give a vector m_k in R^r for every position, whose product with W_2 is added to the base
logits: B_k = W_2 m_k. Shapes: ... leading dimensions, G block positions, H hidden, r Markov rank, V
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draftkit.draft.drafter import DrafterConfig


class MarkovHead(nn.Module):
    """Markov: m_k = W_1[x_{k-1}]. Gated: m_k = W_1[x_{k-1}] * sigmoid(W [h_k ; W_1[x_{k-1}]]). RNN: z_k =
    [s_{k-1} ; W_1[x_{k-1}] ; h_k], s_k = sigmoid(W_g z) s_{k-1} + (1 - sigmoid(W_g z)) tanh(W_c z), m_k =
    tanh(W_o z), s_0 = 0; its three matrices are one linear layer."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.kind = config.head
        rank, hidden = config.markov_rank, config.hidden_size
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.head_size, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        nn.init.zeros_(self.markov_w2.weight)  # training starts from the parallel stage alone
        if self.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def previous(self, tokens: Tensor) -> Tensor:
        """W_1[x_{k-1}]: ids [...] to [..., r]."""
        out: Tensor = self.markov_w1(tokens)
        return out

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """m_k [..., r] and the next state of one position, from h_k [..., H] and W_1[x_{k-1}] [..., r]."""
        if self.kind == "markov":
            return previous, None
        if self.kind == "gated":
            return previous * torch.sigmoid(self.gate_proj(torch.cat([hidden, previous], -1))), None
        state = torch.zeros_like(previous) if state is None else state
        gate, candidate, output = self.joint_proj(torch.cat([state, previous, hidden], -1)).chunk(3, -1)
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)

    def unroll(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """m of an RNN head for all positions of a block with known tokens: [..., G, H] and [..., G, r] to
        [..., G, r]."""
        state, rows = None, []
        for k in range(hidden.shape[-2]):
            row, state = self.step(hidden[..., k, :], previous[..., k, :], state)
            rows.append(row)
        return torch.stack(rows, -2)


class ConfidenceHead(nn.Module):
    """c_k = sigmoid(w [h_k ; W_1[x_{k-1}]]), without the second part when the configuration says so."""

    def __init__(self, config: DrafterConfig, bias: bool = True) -> None:
        super().__init__()
        self.with_markov = config.confidence_with_markov and config.head != "none"
        self.stop_gradient = config.confidence_stop_gradient
        width = config.hidden_size + (config.markov_rank if self.with_markov else 0)
        self.proj = nn.Linear(width, 1, bias=bias)
        nn.init.zeros_(self.proj.weight)

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """Logits [...] of the confidences."""
        parts = [hidden, previous] if self.with_markov and previous is not None else [hidden]
        joined = torch.cat(parts, -1)
        out: Tensor = self.proj(joined.detach() if self.stop_gradient else joined)
        return out.squeeze(-1)

"""Random rows of a loss: whole and shortened blocks, of a small vocabulary; and settings with each term."""

from __future__ import annotations

import torch
from torch import Tensor

from draftkit.draft.losses import Head, Rows
from draftkit.settings import LossSettings

HIDDEN, RANK, VOCABULARY, GAMMA = 6, 4, 23, 5
# whole and shortened blocks, and two that are absent
GRID = [0, 1, 2, 3, 4, 5, 6, 10, 15, 16, 17, 18, 19, 20, 30, 31]
TERMS = {
    "CE": LossSettings(ce=1, tv=0),
    "TV": LossSettings(ce=0, tv=1),
    "KL": LossSettings(ce=0, tv=0, kl=1),
    "LK": LossSettings(ce=0, tv=0, lk=1),
    "the paper's mix": LossSettings(),
    "all at once": LossSettings(ce=0.3, tv=0.5, kl=0.7, lk=0.9, decay=2.0),
    "D-PACE": LossSettings(ce=1, tv=0, weighting="dpace"),
    "D-PACE on all": LossSettings(ce=0.3, tv=0.5, kl=0.7, lk=0.9, weighting="dpace"),
}


def make_rows(
    dtype: torch.dtype = torch.float64,
    soft_cap: float | None = None,
    scale: float = 1.0,
    vocabulary: int = VOCABULARY,
) -> Rows:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    head = Head(random(vocabulary, HIDDEN), scale, soft_cap)
    return Rows(
        hidden_NH=random(len(GRID), HIDDEN, grad=True),
        head=head,
        markov=(random(len(GRID), RANK, grad=True), random(vocabulary, RANK, grad=True)),
        target_hidden_NH=random(len(GRID), HIDDEN),
        target_head=head,
        tokens_N=torch.randint(0, vocabulary, (len(GRID),), generator=generator),
        grid_N=torch.tensor(GRID),
        gamma=GAMMA,
        place_N=torch.arange(len(GRID)),
    )

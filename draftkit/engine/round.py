"""The numerical half of a round, for many requests at once: verify the proposals, look up log probabilities.

Shapes: D requests that draft, A requests that get a token, G = gamma drafted tokens, N rows of logits, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.adjust import Adjustment, wide
from draftkit.engine.drawing import Drawn
from draftkit.ops.native_sampling import NativeProposals, NativeRows, describable
from draftkit.ops.sampling import distributions
from draftkit.ops.verify import TOKEN_RULE, DenseProposals, verify


@dataclass(frozen=True)
class ProposalBatch:
    """Proposals of the requests that get a token, those that do not draft with length 0: tokens int64 [A, G],
    and how many are verified, int64 [A]. `drafting` are the rows of the D that did draft, `drawn` what their
    tokens were drawn from (None when all are greedy). Confidences or, without a confidence head, largest
    probabilities of their tokens are [D, G]."""

    tokens_AG: Tensor
    drawn: Drawn | None
    lengths_A: np.ndarray
    drafting: list[int]
    confidence_DG: np.ndarray | None = None
    largest_DG: np.ndarray | None = None

    @cached_property
    def host_tokens_AG(self) -> np.ndarray:
        """The tokens on the host."""
        return self.tokens_AG.cpu().numpy()


def place(values_D: Tensor, drafting_D: Sequence[int], answering: int) -> Tensor:
    """[D, ...] at the rows `drafting_D` of [A, ...], zeros elsewhere."""
    if len(values_D) == answering:
        return values_D
    index = torch.tensor(drafting_D, device=values_D.device)
    return values_D.new_zeros(answering, *values_D.shape[1:]).index_copy_(0, index, values_D)


def verify_proposals(
    logits_NV: Tensor,
    best_N: np.ndarray | None,
    proposals: ProposalBatch,
    settings_A: np.ndarray,
    uniforms_A2: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """How many drafted tokens each request keeps, and its next token: int64 [A] each, on the host.

    `logits_NV` holds lengths + 1 rows per request; `best_N` says where each is largest, if that is known.
    Greedy requests alone are compared with the largest logits: what `verify` does with one-hot distributions.
    """
    longest = int(proposals.lengths_A.max()) if proposals.drafting else 0
    if (settings_A["temperature"] == 0).all():
        best_N = _best(logits_NV) if best_N is None else best_N
        if not longest:
            return np.zeros(len(best_N), np.int64), best_N
        cells = _cells(proposals.lengths_A, longest)
        best_AG = best_N.reshape(-1, longest + 1) if cells is None else best_N[cells]
        kept_AG = proposals.host_tokens_AG[:, :longest] == best_AG[:, :longest]
        kept_AG &= np.arange(longest) < proposals.lengths_A[:, None]
        accepted_A = np.logical_and.accumulate(kept_AG, 1).sum(1)
        return accepted_A, best_AG[np.arange(len(best_AG)), accepted_A]
    drawn = proposals.drawn
    if describable(logits_NV) and (drawn is None or drawn.chances_DG is not None):
        return _described(logits_NV, proposals, longest, settings_A).verify(uniforms_A2)
    rows_N = distributions(logits_NV, settings_A.repeat(proposals.lengths_A + 1))
    if not longest:
        return np.zeros(len(settings_A), np.int64), rows_N.draw(uniforms_A2[:, 1]).cpu().numpy()
    uniforms = torch.from_numpy(np.ascontiguousarray(uniforms_A2)).to(logits_NV.device)
    verdict = verify(TOKEN_RULE, _dense(rows_N.dense(), proposals, longest), uniforms)
    accepted, following = torch.stack([verdict.accepted_R, verdict.next_token_R]).cpu().numpy()
    return accepted, following


def _described(
    logits_NV: Tensor, proposals: ProposalBatch, longest: int, settings_A: np.ndarray
) -> NativeProposals:
    answering, drafting, drawn = len(proposals.lengths_A), proposals.drafting, proposals.drawn
    first_A, chances_AG = np.zeros(answering, np.int64), np.zeros((answering, longest))
    drafts = None
    if drawn is not None:
        assert isinstance(drawn.rows, NativeRows) and drawn.chances_DG is not None
        drafts = drawn.rows
        first_A[drafting] = np.arange(len(drafting)) * drawn.chances_DG.shape[1]
        chances_AG[drafting] = drawn.chances_DG[:, :longest]
    tokens_AG = proposals.host_tokens_AG[:, :longest]
    return NativeProposals(logits_NV, settings_A, proposals.lengths_A, tokens_AG, chances_AG, first_A, drafts)


def _dense(p_NV: Tensor, proposals: ProposalBatch, longest: int) -> DenseProposals:
    """`p_NV` are the target's rows, lengths + 1 of each request."""
    gamma, cells = proposals.tokens_AG.shape[1], _cells(proposals.lengths_A, longest)
    index = None if cells is None else torch.from_numpy(cells).to(p_NV.device)
    p_AGV = p_NV.unflatten(0, (-1, longest + 1)) if index is None else p_NV[index]
    tokens_AG = proposals.tokens_AG[:, :longest]
    if proposals.drawn is not None:
        q_DGV = proposals.drawn.dense().unflatten(0, (-1, gamma))[:, :longest]
        q_AGV = place(q_DGV, proposals.drafting, len(p_AGV))
    else:  # greedy drafts
        q_AGV = torch.zeros_like(p_AGV[:, :-1]).scatter_(-1, tokens_AG[..., None], 1.0)
    lengths_A = torch.from_numpy(proposals.lengths_A).to(p_NV.device)
    return DenseProposals(tokens_AG, p_AGV, q_AGV, lengths_A)


def adjust_rows(
    logits_NV: Tensor, proposals: ProposalBatch, adjustments_A: Sequence[Adjustment | None], in_place: bool
) -> Tensor:
    """The logits that sampling sees; the given ones where nothing is adjusted, or where they may be
    overwritten."""
    if not any(adjustments_A):
        return logits_NV
    ends_A = (proposals.lengths_A + 1).cumsum()
    adjusted = logits_NV if in_place and logits_NV.dtype == torch.float32 else wide(logits_NV)
    for row, adjustment in enumerate(adjustments_A):
        if adjustment is not None:
            length, end = int(proposals.lengths_A[row]), int(ends_A[row])
            drafts = proposals.host_tokens_AG[row, :length].tolist()
            adjustment.apply(adjusted[end - length - 1 : end], drafts)
    return adjusted


def log_probs(
    logits_NV: Tensor, rows: Sequence[int], tokens: Sequence[int], top: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Natural logarithms of the probabilities of `tokens` in `rows`, and of the `top` most likely tokens of
    each row."""
    device = logits_NV.device
    wide_NV = logits_NV[torch.tensor(rows, device=device)].float()
    sums_N1 = wide_NV.logsumexp(-1, keepdim=True)
    own_N1 = wide_NV.gather(1, torch.tensor(tokens, device=device)[:, None]) - sums_N1
    values, ids = wide_NV.topk(min(top, wide_NV.shape[1]), -1)
    best = [
        list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), (values - sums_N1).tolist(), strict=True)
    ]
    return own_N1.squeeze(1).tolist(), best


def _best(logits_NV: Tensor) -> np.ndarray:
    """The most likely token of each row, int64 [N] on the host; NumPy finds one among few thousands in a
    tenth of the time."""
    if logits_NV.device.type == "cpu" and logits_NV.dtype == torch.float32:
        return logits_NV.numpy().argmax(-1)
    best_N: np.ndarray = logits_NV.argmax(-1).cpu().numpy()
    return best_N


def _cells(lengths_A: np.ndarray, longest: int) -> np.ndarray | None:
    """Row of each cell [A, longest + 1]; cells after a length repeat its last row. None when nothing is
    padded."""
    if (lengths_A == longest).all():
        return None
    first_A = (lengths_A + 1).cumsum() - lengths_A - 1
    return first_A[:, None] + np.minimum(np.arange(longest + 1), lengths_A[:, None])

"""The numerical half of a round, for many requests at once: draw the proposals, judge them, look up log probabilities.

Shapes: D requests that draft, A requests that get a token, G = gamma drafted tokens, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.adjust import Adjustment, wide
from draftkit.engine.row_sampling import RowSampling, processed_rows
from draftkit.ops.sampling import sample
from draftkit.ops.verify import TOKEN_RULE, verify


class Chooser:
    """Draws drafted tokens, position by position, for `FastDrafter.draft`; `seconds` is the time it took.

    `adjustments_D` changes the logits of single requests first. When all rows are greedy no distribution is built: the
    second result is then [D, 0].
    """

    def __init__(self, rows: RowSampling, uniforms_DG: Tensor, adjustments_D: Sequence[Adjustment | None]) -> None:
        self._rows, self._uniforms_DG = rows, uniforms_DG
        self._adjusted = [(i, a, list[int]()) for i, a in enumerate(adjustments_D) if a is not None]
        self.seconds = 0.0

    def __call__(self, logits_DV: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Tokens [D] and the distributions they were drawn from."""
        began = time.perf_counter()
        if self._adjusted:
            logits_DV = wide(logits_DV)
            for row, adjustment, drafts in self._adjusted:
                logits_DV[row : row + 1] = adjustment.apply(logits_DV[row : row + 1], drafts, position)
        if self._rows.greedy:
            tokens_D, probs_DV = logits_DV.argmax(-1), logits_DV.new_empty(len(logits_DV), 0)
        else:
            probs_DV = processed_rows(logits_DV, self._rows)
            tokens_D = sample(probs_DV, self._uniforms_DG[:, position])
        for row, _, drafts in self._adjusted:
            drafts.append(int(tokens_D[row]))
        self.seconds += time.perf_counter() - began
        return tokens_D, probs_DV


@dataclass(frozen=True)
class Offered:
    """Proposals of the requests that get a token, those that do not draft with length 0: tokens int64 [A, G], their
    distributions [A, G, V] (None when all are greedy), and how many are verified, int64 [A]. `drafting` are the rows
    of those that did draft; their confidences are [D, G] or None."""

    tokens_AG: Tensor
    probs_AGV: Tensor | None
    lengths_A: np.ndarray
    drafting: list[int]
    confidence_DG: np.ndarray | None

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


def judge(
    logits_NV: Tensor, best_N: np.ndarray | None, offered: Offered, rows: RowSampling, uniforms_A2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many drafted tokens each request keeps, and its next token: int64 [A] each, on the host.

    `logits_NV` holds lengths + 1 rows per request; `best_N` says where each is largest, if that is known. Greedy requests
    alone are compared with the largest logits: what `verify` does with one-hot distributions.
    """
    longest = int(offered.lengths_A.max()) if offered.drafting else 0
    if offered.probs_AGV is None:
        best_N = _best(logits_NV) if best_N is None else best_N
        if not longest:
            return np.zeros(len(best_N), np.int64), best_N
        cells = _cells(offered.lengths_A, longest)
        best_AG = best_N.reshape(-1, longest + 1) if cells is None else best_N[cells]
        kept_AG = offered.host_tokens_AG[:, :longest] == best_AG[:, :longest]
        kept_AG &= np.arange(longest) < offered.lengths_A[:, None]
        accepted_A = np.logical_and.accumulate(kept_AG, 1).sum(1)
        return accepted_A, best_AG[np.arange(len(best_AG)), accepted_A]
    cells = _cells(offered.lengths_A, longest)
    lengths_A = torch.from_numpy(offered.lengths_A).to(logits_NV.device)
    if rows.temperature is not None:
        rows = rows.repeat(lengths_A + 1)
    probs_NV = processed_rows(logits_NV, rows)
    index = None if cells is None else torch.from_numpy(cells).to(probs_NV.device)
    p_AGV = probs_NV.unflatten(0, (-1, longest + 1)) if index is None else probs_NV[index]
    q_AGV = offered.probs_AGV[:, :longest]
    uniforms = torch.from_numpy(np.ascontiguousarray(uniforms_A2)).to(logits_NV.device)
    verdict = verify(TOKEN_RULE, offered.tokens_AG[:, :longest], p_AGV, q_AGV, lengths_A, uniforms)
    accepted, following = torch.stack([verdict.accepted_R, verdict.next_token_R]).cpu().numpy()
    return np.minimum(accepted, offered.lengths_A), following  # where logits are no numbers no rule holds


def adjust_rows(
    logits_NV: Tensor, offered: Offered, adjustments_A: Sequence[Adjustment | None]
) -> Tensor:
    """The logits that sampling sees; the given ones where nothing is adjusted."""
    if not any(adjustments_A):
        return logits_NV
    ends_A = (offered.lengths_A + 1).cumsum()
    adjusted = wide(logits_NV)
    for row, adjustment in enumerate(adjustments_A):
        if adjustment is not None:
            length, end = int(offered.lengths_A[row]), int(ends_A[row])
            drafts = offered.host_tokens_AG[row, :length].tolist()
            adjusted[end - length - 1 : end] = adjustment.apply(logits_NV[end - length - 1 : end], drafts)
    return adjusted


def log_probs(
    logits_NV: Tensor, rows: Sequence[int], tokens: Sequence[int], top: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Natural logarithms of the probabilities of `tokens` in `rows`, and of the `top` most likely tokens of each row."""
    device = logits_NV.device
    found_NV = torch.log_softmax(logits_NV[torch.tensor(rows, device=device)].float(), -1)
    own = found_NV.gather(1, torch.tensor(tokens, device=device)[:, None]).squeeze(1).tolist()
    values, ids = found_NV.topk(min(top, found_NV.shape[1]), -1)
    return own, [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


def _best(logits_NV: Tensor) -> np.ndarray:
    """The most likely token of each row, int64 [N] on the host; NumPy finds one among few thousands in a tenth of the time."""
    if logits_NV.device.type == "cpu" and logits_NV.dtype == torch.float32:
        return logits_NV.numpy().argmax(-1)
    best_N: np.ndarray = logits_NV.argmax(-1).cpu().numpy()
    return best_N


def _cells(lengths_A: np.ndarray, longest: int) -> np.ndarray | None:
    """Row of each cell [A, longest + 1]; cells behind a length repeat its last row. None when nothing is padded."""
    if (lengths_A == longest).all():
        return None
    first_A = (lengths_A + 1).cumsum() - lengths_A - 1
    return first_A[:, None] + np.minimum(np.arange(longest + 1), lengths_A[:, None])
